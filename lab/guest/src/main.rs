//! The guest daemon of the lab: TCP echo, counter page, planted secret.
fn main() {}
