//! Signed things: permits, votes, renunciations, receipts, audit checkpoints.
