//! The control manager daemon.
