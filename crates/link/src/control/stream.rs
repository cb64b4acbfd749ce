//! A connection after its handshake: bytes, and who is at the other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use types::Digest;

use crate::identity::{PeerIdentity, key_digest_of};

/// A TLS connection. Serves tonic, hyper and axum as their I/O.
#[derive(Debug)]
pub struct TlsConn {
    inner: Box<TlsStream<TcpStream>>,
    peer: Option<PeerIdentity>,
    peer_address: SocketAddr,
}

impl TlsConn {
    /// The verified peer's identity was checked in the handshake; here it is only read again.
    pub(super) fn new(inner: TlsStream<TcpStream>, peer_address: SocketAddr) -> Self {
        let leaf = inner.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let peer = leaf.and_then(|der| PeerIdentity::from_certificate(der).ok());
        Self { inner: Box::new(inner), peer, peer_address }
    }

    /// Who the peer proved to be; `None` where it presented no certificate (a joining host, an operator).
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.peer.as_ref()
    }

    /// BLAKE3 of the SubjectPublicKeyInfo with which the peer proved who it is; `None` as for [`Self::peer`].
    pub fn peer_key(&self) -> Option<Digest> {
        self.certificates().first().and_then(|der| key_digest_of(der).ok())
    }

    /// From where it is connected.
    pub fn peer_address(&self) -> SocketAddr {
        self.peer_address
    }

    pub(super) fn certificates(&self) -> &[rustls::pki_types::CertificateDer<'static>] {
        self.inner.get_ref().1.peer_certificates().unwrap_or_default()
    }

    pub(super) fn protocol(&self) -> Option<&[u8]> {
        self.inner.get_ref().1.alpn_protocol()
    }
}

impl AsyncRead for TlsConn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
