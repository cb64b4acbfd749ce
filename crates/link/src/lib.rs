//! The only room that names rustls: identities, mTLS, permit-bound channels.
