//! The database module: schema, transactions, audit chain.
