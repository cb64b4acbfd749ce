//! Pure deciders: hand-over, admission, inspection.
