//! The registry on real databases: the same tests on an SQLite file and on a PostgreSQL server, then what
//! only one of them can suffer.
#![allow(clippy::unwrap_used)]

mod audit;
mod backup;
mod cuts;
mod faults;
mod full_disk;
mod managers;
mod place;
mod platforms;
#[path = "../support/postgres.rs"]
mod postgres;
mod races;
mod records;
mod schema;
#[path = "../../../engine/tests/support/skip.rs"]
mod skip;
mod tls;
mod tree;
