#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
//! Good channels carry every byte; every other one is refused by name and hands out nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use proptest::prelude::*;
use rustls::ConnectionTrafficSecrets;
use types::Digest;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

struct Keys {
    source: EphemeralKey,
    target: EphemeralKey,
}

impl Keys {
    fn new() -> Self {
        Self { source: EphemeralKey::generate().unwrap(), target: EphemeralKey::generate().unwrap() }
    }

    fn client(&self, permit: &[u8], channel: u16) -> ChannelConfig {
        ChannelConfig::new(&self.source, self.target.spki(), &Digest::of(permit), channel).unwrap()
    }

    fn server(&self, permit: &[u8], channel: u16) -> ChannelConfig {
        ChannelConfig::new(&self.target, self.source.spki(), &Digest::of(permit), channel).unwrap()
    }
}

type End = Result<(ChannelTls, ChannelFacts), ChannelError>;

fn end(tls: Result<ChannelTls, ChannelError>, socket: &UnixStream) -> End {
    let mut tls = tls?;
    let facts = tls.handshake(socket, soon())?;
    Ok((tls, facts))
}

/// Both ends shake hands over a socket pair.
fn meet(client: &ChannelConfig, server: &ChannelConfig) -> ((End, UnixStream), (End, UnixStream)) {
    let (near, far) = UnixStream::pair().unwrap();
    let (dialled, accepted) = thread::scope(|scope| {
        let dialling = scope.spawn(|| end(ChannelTls::client(client), &near));
        let accepted = end(ChannelTls::server(server), &far);
        // A refusal ends the connection, as it does in an agent.
        if accepted.is_err() {
            far.shutdown(Shutdown::Both).unwrap();
        }
        (dialling.join().unwrap(), accepted)
    });
    ((dialled, near), (accepted, far))
}

fn established() -> ((ChannelTls, UnixStream), (ChannelTls, UnixStream)) {
    let keys = Keys::new();
    let ((client, near), (server, far)) = meet(&keys.client(b"permit", 0), &keys.server(b"permit", 0));
    ((client.unwrap().0, near), (server.unwrap().0, far))
}

/// Feeds `wire` to `tls` in pieces of these sizes (the last repeats), opening after each.
fn feed(
    tls: &mut ChannelTls,
    mut wire: &[u8],
    sizes: &[usize],
    got: &mut Vec<u8>,
) -> Result<Opened, ChannelError> {
    let mut opened = Opened::More;
    let mut sizes = sizes.iter().copied();
    let mut size = sizes.next().unwrap_or(usize::MAX);
    while !wire.is_empty() {
        let space = tls.receive_space();
        let count = size.max(1).min(wire.len()).min(space.len());
        space[..count].copy_from_slice(&wire[..count]);
        tls.received(count);
        wire = &wire[count..];
        opened = tls.open(|bytes| -> Result<(), ChannelError> {
            got.extend_from_slice(bytes);
            Ok(())
        })?;
        size = sizes.next().unwrap_or(size);
    }
    Ok(opened)
}

/// Everything until the peer closes.
fn drain(tls: &mut ChannelTls, socket: &UnixStream) -> Result<Vec<u8>, ChannelError> {
    let mut got = Vec::new();
    loop {
        let opened = tls.open(|bytes| -> Result<(), ChannelError> {
            got.extend_from_slice(bytes);
            Ok(())
        })?;
        if opened == Opened::Closed {
            return Ok(got);
        }
        let mut fds = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        if tls.receive(socket)? == Received::Closed {
            return Ok(got);
        }
    }
}

fn send_all(socket: &mut UnixStream, bytes: &[u8]) {
    socket.write_all(bytes).unwrap();
}

#[test]
fn a_good_handshake_states_its_facts_on_both_sides() {
    let keys = Keys::new();
    let ((client, _near), (server, _far)) = meet(&keys.client(b"p", 3), &keys.server(b"p", 3));
    let expected = ChannelFacts {
        protocol: "TLSv1.3",
        cipher_suite: "TLS_AES_256_GCM_SHA384",
        key_exchange: "X25519MLKEM768".to_owned(),
    };
    assert_eq!(client.unwrap().1, expected);
    assert_eq!(server.unwrap().1, expected);
}

#[test]
fn sixty_four_mebibytes_over_tcp_arrive_whole_and_in_order() {
    const TOTAL_BYTES: usize = 64 << 20;
    let keys = Keys::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = (keys.client(b"p", 0), keys.server(b"p", 0));
    let sending = thread::spawn(move || {
        let mut socket = TcpStream::connect(address).unwrap();
        let mut tls = ChannelTls::client(&sender).unwrap();
        tls.handshake(&socket, soon()).unwrap();
        let mut hash = blake3_like::Sum::default();
        let mut out = Vec::new();
        for piece in 0..TOTAL_BYTES / (256 << 10) {
            let plain: Vec<u8> = (0..256 << 10).map(|at: usize| (at * 31 + piece) as u8).collect();
            hash.add(&plain);
            tls.seal(&plain, &mut out).unwrap();
            socket.write_all(&out).unwrap();
            out.clear();
        }
        tls.close_notify(&mut out).unwrap();
        socket.write_all(&out).unwrap();
        hash
    });
    let socket = listener.accept().unwrap().0;
    let mut tls = ChannelTls::server(&receiver).unwrap();
    tls.handshake(&socket, soon()).unwrap();
    let mut hash = blake3_like::Sum::default();
    while tls
        .open(|bytes| -> Result<(), ChannelError> {
            hash.add(bytes);
            Ok(())
        })
        .unwrap()
        == Opened::More
    {
        let mut fds = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        tls.receive(&socket).unwrap();
    }
    assert_eq!(hash.count, TOTAL_BYTES);
    assert_eq!(hash, sending.join().unwrap());
}

/// An order-sensitive sum, so that this room needs no hash crate for a test.
mod blake3_like {
    #[derive(Debug, Default, PartialEq, Eq)]
    pub(super) struct Sum {
        pub(super) count: usize,
        state: u64,
    }
    impl Sum {
        pub(super) fn add(&mut self, bytes: &[u8]) {
            self.count += bytes.len();
            for byte in bytes {
                self.state =
                    (self.state ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(9);
            }
        }
    }
}

#[test]
fn a_key_that_the_permit_does_not_name_is_refused_on_either_side() {
    let (keys, other) = (Keys::new(), Keys::new());
    let impostor = ChannelConfig::new(&other.source, keys.target.spki(), &Digest::of(b"p"), 0).unwrap();
    let ((client, near), (server, _far)) = meet(&impostor, &keys.server(b"p", 0));
    assert!(matches!(server, Err(ChannelError::WrongPeerKey)), "{:?}", server.err());
    // TLS 1.3 lets the client finish first; the refusal reaches it with the first record.
    let told = client.and_then(|(mut tls, _)| drain(&mut tls, &near));
    assert!(matches!(told, Err(ChannelError::RefusedByPeer { .. })), "{told:?}");

    let impostor = ChannelConfig::new(&other.target, keys.source.spki(), &Digest::of(b"p"), 0).unwrap();
    let ((client, _near), (server, _far)) = meet(&keys.client(b"p", 0), &impostor);
    assert!(matches!(client, Err(ChannelError::WrongPeerKey)), "{:?}", client.err());
    assert!(matches!(server, Err(ChannelError::RefusedByPeer { .. })), "{:?}", server.err());
}

#[test]
fn another_permit_or_channel_number_is_refused_on_both_sides() {
    let keys = Keys::new();
    for (client, server) in [
        (keys.client(b"permit", 0), keys.server(b"other permit", 0)),
        (keys.client(b"permit", 0), keys.server(b"permit", 1)),
        (keys.client(b"permit", 1), keys.server(b"permit", 11)),
    ] {
        let ((client, _near), (server, _far)) = meet(&client, &server);
        assert!(matches!(client, Err(ChannelError::WrongBinding)), "{:?}", client.err());
        assert!(matches!(server, Err(ChannelError::WrongBinding)), "{:?}", server.err());
    }
}

#[test]
fn a_peer_without_any_binding_is_refused_on_both_sides() {
    let keys = Keys::new();
    let mut unbound = keys.client(b"p", 0);
    unbound.forget_binding();
    let ((_, _near), (server, _far)) = meet(&unbound, &keys.server(b"p", 0));
    assert!(matches!(server, Err(ChannelError::WrongBinding)), "{:?}", server.err());

    let mut unbound = keys.server(b"p", 0);
    unbound.forget_binding();
    let ((client, _near), _) = meet(&keys.client(b"p", 0), &unbound);
    assert!(matches!(client, Err(ChannelError::WrongBinding)), "{:?}", client.err());
}

#[test]
fn an_unusable_peer_key_is_refused_before_any_connection() {
    let key = EphemeralKey::generate().unwrap();
    let refused = |spki: &[u8]| ChannelConfig::new(&key, spki, &Digest::of(b"p"), 0).unwrap_err().code();
    assert_eq!(refused(&[]), "channel-peer-key-unusable");
    assert_eq!(refused(&[0; 44]), "channel-peer-key-unusable");
    assert_eq!(refused(key.spki()), "channel-peer-key-unusable");
}

/// What a server says to a peer that sends these bytes and then closes.
fn server_hears(bytes: &[u8]) -> ChannelError {
    let keys = Keys::new();
    let (mut near, far) = UnixStream::pair().unwrap();
    send_all(&mut near, bytes);
    near.shutdown(Shutdown::Write).unwrap();
    end(ChannelTls::server(&keys.server(b"p", 0)), &far).err().expect("must be refused")
}

/// A TLS 1.2 ClientHello (no supported_versions extension).
fn tls12_client_hello() -> Vec<u8> {
    let mut body = vec![0x03, 0x03];
    body.extend([0x5a; 32]);
    body.extend([0, 0, 4, 0xc0, 0x2f, 0xc0, 0x30, 1, 0]);
    body.extend([0, 22]);
    body.extend([0, 10, 0, 4, 0, 2, 0, 29]);
    body.extend([0, 11, 0, 2, 1, 0]);
    body.extend([0, 13, 0, 4, 0, 2, 4, 3]);
    let mut record = vec![0x16, 0x03, 0x01, 0, (body.len() + 4) as u8, 1, 0, 0, body.len() as u8];
    record.extend(body);
    record
}

#[test]
fn what_is_not_this_protocol_is_refused_by_name() {
    let check = |bytes: &[u8], code: &str| assert_eq!(server_hears(bytes).code(), code, "{bytes:02x?}");
    check(&tls12_client_hello(), "channel-incompatible");
    check(b"QEVM\x00\x00\x00\x03 a plain migration stream, as a careless QEMU sends it", "channel-not-tls");
    check(b"GET / HTTP/1.1\r\nhost: target\r\n\r\n", "channel-not-tls");
    check(&[0; 64], "channel-not-tls");
    check(b"", "channel-truncated");
    check(&[0x16, 0x03, 0x01], "channel-truncated");
    // A ClientHello that announces 60,000 bytes, in records of 1,000.
    let mut endless = Vec::new();
    for piece in 0..30 {
        endless.extend([0x16, 0x03, 0x01, 0x03, 0xe8]);
        let mut body = [0u8; 1000];
        if piece == 0 {
            body[..4].copy_from_slice(&[1, 0, 0xea, 0x60]);
        }
        endless.extend(body);
    }
    check(&endless, "channel-handshake-too-large");
}

#[test]
fn a_silent_peer_runs_into_the_deadline() {
    let keys = Keys::new();
    let (_silent, far) = UnixStream::pair().unwrap();
    let mut tls = ChannelTls::server(&keys.server(b"p", 0)).unwrap();
    let refused = tls.handshake(&far, Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert_eq!(refused.code(), "channel-handshake-timeout");
    assert_eq!(
        tls.open(|_| -> Result<(), ChannelError> { panic!("payload") }).unwrap_err().code(),
        "channel-dead"
    );
}

/// A recorded session's client bytes: everything the client ever sent, payload included.
fn recorded_client(keys: &Keys) -> Vec<u8> {
    let (mut client_side, mut tap_near) = UnixStream::pair().unwrap();
    let (mut tap_far, server_side) = UnixStream::pair().unwrap();
    let (client, server) = (keys.client(b"p", 0), keys.server(b"p", 0));
    thread::scope(|scope| {
        let mut back = (tap_far.try_clone().unwrap(), tap_near.try_clone().unwrap());
        scope.spawn(move || std::io::copy(&mut back.0, &mut back.1));
        let recording = scope.spawn(move || {
            let mut all = Vec::new();
            let mut piece = [0; 4096];
            loop {
                let count = tap_near.read(&mut piece).unwrap();
                if count == 0 {
                    tap_far.shutdown(Shutdown::Both).unwrap();
                    return all;
                }
                all.extend_from_slice(&piece[..count]);
                tap_far.write_all(&piece[..count]).unwrap();
            }
        });
        let serving = scope.spawn(move || {
            let (mut tls, _) = end(ChannelTls::server(&server), &server_side).unwrap();
            assert_eq!(drain(&mut tls, &server_side).unwrap(), b"secret page");
        });
        let (mut tls, _) = end(ChannelTls::client(&client), &client_side).unwrap();
        let mut out = Vec::new();
        tls.seal(b"secret page", &mut out).unwrap();
        tls.close_notify(&mut out).unwrap();
        send_all(&mut client_side, &out);
        serving.join().unwrap();
        client_side.shutdown(Shutdown::Write).unwrap();
        recording.join().unwrap()
    })
}

#[test]
fn a_replayed_recording_is_refused_and_so_is_every_truncation_of_it() {
    let keys = Keys::new();
    let recording = recorded_client(&keys);
    let replay = |bytes: &[u8]| {
        let (mut near, far) = UnixStream::pair().unwrap();
        send_all(&mut near, bytes);
        near.shutdown(Shutdown::Write).unwrap();
        end(ChannelTls::server(&keys.server(b"p", 0)), &far).err().expect("must be refused").code()
    };
    assert_eq!(replay(&recording), "channel-foreign-record");
    for cut in [1, 5, 100, 1000, recording.len() / 2] {
        let code = replay(&recording[..cut]);
        assert!(["channel-truncated", "channel-foreign-record"].contains(&code), "{cut}: {code}");
    }
}

#[test]
fn a_close_without_close_notify_is_a_truncation_and_never_an_end() {
    let ((mut client, mut near), (mut server, far)) = established();
    let mut out = Vec::new();
    client.seal(b"half of it", &mut out).unwrap();
    send_all(&mut near, &out);
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(drain(&mut server, &far).unwrap_err().code(), "channel-truncated");
    assert_eq!(server.seal(b"more", &mut out).unwrap_err().code(), "channel-dead");
}

#[test]
fn after_a_close_nothing_is_sealed_and_trailing_bytes_belong_to_nobody() {
    let ((mut client, mut near), (mut server, far)) = established();
    let mut out = Vec::new();
    client.seal(b"all of it", &mut out).unwrap();
    client.close_notify(&mut out).unwrap();
    assert_eq!(client.seal(b"more", &mut out).unwrap_err().code(), "channel-not-open");
    out.extend_from_slice(b"appended by somebody on the way");
    send_all(&mut near, &out);
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(drain(&mut server, &far).unwrap(), b"all of it");
    assert_eq!(server.receive(&far).unwrap(), Received::Closed);
    // The other direction still works: half-close.
    out.clear();
    server.seal(b"thanks", &mut out).unwrap();
    let mut got = Vec::new();
    feed(&mut client, &out, &[], &mut got).unwrap();
    assert_eq!(got, b"thanks");
}

#[test]
fn an_altered_reordered_or_repeated_record_ends_the_channel() {
    let alterations: [fn(&mut Vec<u8>, usize); 4] = [
        |wire, record| wire[record + 9] ^= 1,
        |wire, record| wire.drain(record..2 * record).for_each(drop),
        |wire, record| {
            let first = wire[..record].to_vec();
            wire.splice(record..record, first);
        },
        |wire, record| wire[..2 * record].rotate_left(record),
    ];
    for alter in alterations {
        let ((mut client, _near), (mut server, _far)) = established();
        let mut wire = Vec::new();
        for page in 0..3u8 {
            client.seal(&[page; 100], &mut wire).unwrap();
        }
        let record = wire.len() / 3;
        alter(&mut wire, record);
        let mut got = Vec::new();
        let refused = feed(&mut server, &wire, &[], &mut got).unwrap_err();
        assert_eq!(refused.code(), "channel-foreign-record");
        assert!(got.is_empty() || got == [0; 100], "only what came before the alteration");
        let dead = server.open(|_| -> Result<(), ChannelError> { panic!("payload") }).unwrap_err();
        assert_eq!(dead.code(), "channel-dead");
    }
}

#[test]
fn a_sink_that_refuses_ends_the_channel() {
    let ((mut client, _near), (mut server, _far)) = established();
    let mut wire = Vec::new();
    client.seal(&[1; 40_000], &mut wire).unwrap();
    let space = server.receive_space();
    space[..wire.len()].copy_from_slice(&wire);
    server.received(wire.len());
    let mut calls = 0;
    let refused = server.open(|_| {
        calls += 1;
        Err(ChannelError::ReceiveBufferFull)
    });
    assert_eq!((refused.unwrap_err().code(), calls), ("channel-receive-buffer-full", 1));
    assert_eq!(
        server.open(|_| -> Result<(), ChannelError> { panic!("payload") }).unwrap_err().code(),
        "channel-dead"
    );
}

#[test]
fn keys_change_in_mid_stream_without_losing_a_byte() {
    let ((mut client, _near), (mut server, _far)) = established();
    let (mut wire, mut got) = (Vec::new(), Vec::new());
    for round in 0..4u8 {
        client.seal(&[round; 30_000], &mut wire).unwrap();
        on_connection!(&mut client.connection, tls => match tls.process_tls_records(&mut []).state.unwrap() {
            ConnectionState::WriteTraffic(traffic) => traffic.refresh_traffic_keys().unwrap(),
            other => panic!("{other:?}"),
        });
    }
    client.seal(&[9; 10], &mut wire).unwrap();
    feed(&mut server, &wire, &[7000], &mut got).unwrap();
    let expected: Vec<u8> = (0..4u8).flat_map(|round| [round; 30_000]).chain([9; 10]).collect();
    assert!(got == expected);
    // And the answer of the server, which the update may have asked to change keys too.
    let (mut wire, mut got) = (Vec::new(), Vec::new());
    server.seal(b"answer", &mut wire).unwrap();
    feed(&mut client, &wire, &[], &mut got).unwrap();
    assert_eq!(got, b"answer");
}

/// A peer that holds the right key and turns hostile: it can make any record.
fn hostile_client(keys: &Keys) -> (impl FnMut(u8, &[u8]) -> Vec<u8>, ChannelTls) {
    let (mut near, far) = UnixStream::pair().unwrap();
    let (client, server) = (keys.client(b"p", 0), keys.server(b"p", 0));
    let accepting = thread::spawn(move || end(ChannelTls::server(&server), &far).unwrap().0);
    let mut config = (*client.client().unwrap()).clone();
    config.enable_secret_extraction = true;
    let mut connection =
        rustls::ClientConnection::new(std::sync::Arc::new(config), config::unused_server_name()).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut near).unwrap();
    }
    let server = accepting.join().unwrap();
    let (sequence, secrets) = connection.dangerous_extract_secrets().unwrap().tx;
    let ConnectionTrafficSecrets::Aes256Gcm { key, iv } = secrets else { panic!("another cipher suite") };
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref()).unwrap());
    let mut sequence = sequence;
    let forge = move |content_type: u8, payload: &[u8]| {
        let mut nonce: [u8; 12] = iv.as_ref().try_into().unwrap();
        for (byte, count) in nonce[4..].iter_mut().zip(sequence.to_be_bytes()) {
            *byte ^= count;
        }
        sequence += 1;
        let mut inner = payload.to_vec();
        inner.push(content_type);
        let header = [0x17, 3, 3, 0, u8::try_from(inner.len() + 16).unwrap()];
        let nonce = Nonce::assume_unique_for_key(nonce);
        key.seal_in_place_append_tag(nonce, Aad::from(header), &mut inner).unwrap();
        [&header[..], &inner].concat()
    };
    (forge, server)
}

#[test]
fn a_hostile_peer_with_the_right_key_causes_no_panic_and_no_end() {
    let keys = Keys::new();
    let (mut forge, mut server) = hostile_client(&keys);
    let (mut got, mut out) = (Vec::new(), Vec::new());
    feed(&mut server, &forge(23, b"page"), &[], &mut got).unwrap();
    assert_eq!(got, b"page");
    // Half a KeyUpdate: TLS keeps an offset into the buffer, and sealing must not trip over it.
    assert_eq!(feed(&mut server, &forge(22, &[24, 0, 0]), &[], &mut got).unwrap(), Opened::More);
    server.seal(b"a return-path reply", &mut out).unwrap();
    assert_eq!(feed(&mut server, &forge(22, &[1, 0]), &[1], &mut got).unwrap(), Opened::More);
    // Key updates without end, a renegotiation, an unknown record, nothing but empty records.
    let hostile: [(u8, &[u8], usize); 4] =
        [(22, &[24, 0, 0, 1, 1], 100), (22, &[1, 0, 0, 2, 3, 3], 1), (99, b"?", 1), (23, b"", 100)];
    for (content_type, payload, times) in hostile {
        let (mut forge, mut server) = hostile_client(&keys);
        let refused =
            (0..times).find_map(|_| feed(&mut server, &forge(content_type, payload), &[], &mut got).err());
        if content_type != 22 || payload[0] != 24 {
            assert!(refused.is_some(), "{content_type} {payload:?} was never refused");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bytes_are_equal_after_any_split(
        pieces in proptest::collection::vec(0usize..70_000, 1..8),
        cuts in proptest::collection::vec(1usize..40_000, 1..20),
        seed: u8,
    ) {
        let ((mut client, _near), (mut server, _far)) = established();
        let (mut sent, mut wire, mut got) = (Vec::new(), Vec::new(), Vec::new());
        for piece in pieces {
            let plain: Vec<u8> = (0..piece).map(|at| (at as u8).wrapping_mul(13) ^ seed).collect();
            let before = wire.len();
            client.seal(&plain, &mut wire).unwrap();
            prop_assert_eq!(wire.len() - before, sealed_bytes(piece));
            sent.extend(plain);
        }
        client.close_notify(&mut wire).unwrap();
        prop_assert_eq!(feed(&mut server, &wire, &cuts, &mut got).unwrap(), Opened::Closed);
        prop_assert!(sent == got);
    }

    #[test]
    fn garbage_never_panics_and_never_opens(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let code = server_hears(&bytes).code();
        prop_assert!(code.starts_with("channel-"));
    }
}
