//! The host protocol (.proto), HTTP documents and conversions.
