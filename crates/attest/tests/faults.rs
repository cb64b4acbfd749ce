//! A TPM that is busy, killed, reset, exchanged or full; and that nothing is left behind in it.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use attest::testkit::{Forge, KeyShape, Swtpm, digest};
use attest::tpm::{Address, AkBlobs, Options, Tpm, TpmFault, TransportFault};
use attest::{Bank, Evidence};
use support::{PCRS, Platform, binding, codes, pcr, ready, selection};

/// What a TPM of three slots for objects can do only if nothing is left in them.
#[test]
fn nothing_is_left_behind_after_success_and_after_faults() {
    if !ready(&[]) {
        return;
    }
    let (swtpm, mut other) = (Swtpm::start().unwrap(), Platform::new());
    let mut tpm = swtpm.tpm().unwrap();
    let blobs = tpm.create_ak().unwrap();
    let foreign = other.tpm.create_ak().unwrap();
    for round in 0..5 {
        let ak = tpm.load_ak(&blobs).unwrap();
        let question = binding("host-a", round);
        tpm.evidence(&ak, &selection(&PCRS), &question.qualifying_data(), None).unwrap();
        let refused = tpm.load_ak(&foreign).unwrap_err();
        assert!(refused.to_string().contains("not of this TPM"), "{refused}");
        let junk = attest::enrol::Challenge {
            id_object: attest::Bounded::new(vec![0; 68]).unwrap(),
            encrypted_secret: attest::Bounded::new(vec![0; 256]).unwrap(),
        };
        assert!(tpm.activate_credential(&ak, &junk).unwrap_err().code().is_some());
        tpm.unload_ak(ak).unwrap();
        assert_eq!(tpm.flush_stale().unwrap(), 0, "round {round}");
    }
    // What the caller still holds goes with the connection.
    let _held = tpm.load_ak(&blobs).unwrap();
    drop(tpm);
    assert_eq!(swtpm.tpm().unwrap().flush_stale().unwrap(), 0);
}

#[test]
fn what_a_killed_predecessor_left_is_flushed() {
    if !ready(&[]) {
        return;
    }
    let swtpm = Swtpm::start().unwrap();
    let relay = Relay::start(&swtpm, |_| Act::Pass);
    let mut tpm = relay.tpm();
    let blobs = tpm.create_ak().unwrap();
    let _held = tpm.load_ak(&blobs).unwrap();
    // The connection breaks before anything can be flushed.
    relay.cut();
    drop(tpm);
    assert_eq!(swtpm.tpm().unwrap().flush_stale().unwrap(), 1);
    assert_eq!(swtpm.tpm().unwrap().flush_stale().unwrap(), 0);
}

#[test]
fn a_restarted_daemon_loads_the_same_key() {
    if !ready(&[]) {
        return;
    }
    let (mut platform, blobs) = Platform::with_kept_key();
    let kept = blobs.to_bytes();
    platform.swtpm.power_on().unwrap();
    platform.tpm = platform.swtpm.tpm().unwrap();
    let blobs = AkBlobs::from_bytes(&kept).unwrap();
    platform.ak = platform.tpm.load_ak(&blobs).unwrap();
    let question = binding("host-a", 1);
    let evidence = platform.evidence(&question);
    assert_eq!(codes(&platform.appraise(&question, &evidence)), Vec::<&str>::new());
    // A file that was cut or lengthened.
    for bad in [&kept[..kept.len() - 1], &[&kept[..], &[0]].concat(), &[]] {
        assert!(AkBlobs::from_bytes(bad).is_err());
    }
    // A file of which a byte was changed: the TPM refuses it, or the manager does not know the key.
    let mut changed = kept.clone();
    changed[40] ^= 1;
    assert!(platform.tpm.load_ak(&AkBlobs::from_bytes(&changed).unwrap()).is_err());
    assert!(!format!("{blobs:?}").contains(&hex::encode(&kept[2..10])), "the private half is not shown");
}

#[test]
fn a_tpm_that_is_killed_in_the_middle_is_a_fault_in_time() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    platform.swtpm.power_off();
    let start = Instant::now();
    let question = binding("host-a", 1);
    let data = question.qualifying_data();
    let fault = platform.tpm.evidence(&platform.ak, &selection(&PCRS), &data, None).unwrap_err();
    assert!(matches!(fault, TpmFault::Transport { .. }), "{fault:?}");
    // The connection is of no use any more, even when the TPM is back.
    platform.swtpm.power_on().unwrap();
    let fault = platform.tpm.read_clock().unwrap_err();
    assert!(matches!(fault, TpmFault::Transport { source: TransportFault::Spent, .. }), "{fault:?}");
    // A new one works; a key that was loaded before the reset does not.
    let mut again = platform.swtpm.tpm().unwrap();
    let fault = again.quote(&platform.ak, &selection(&PCRS), &data).unwrap_err();
    assert!(fault.to_string().contains("not loaded"), "{fault}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_tpm_that_is_killed_while_it_works_is_a_fault() {
    if !ready(&[]) {
        return;
    }
    // Kill at each of the 16 commands of a whole round, when the command is through and before its answer is.
    for at in 0..16 {
        let mut swtpm = Swtpm::start().unwrap();
        let relay = Relay::start(&swtpm, move |count| if count == at { Act::Swallow } else { Act::Pass });
        let mut tpm = relay.tpm();
        let killed = std::thread::spawn(move || {
            let blobs = tpm.create_ak()?;
            let ak = tpm.load_ak(&blobs)?;
            tpm.evidence(&ak, &selection(&PCRS), &binding("host-a", 1).qualifying_data(), None)
        });
        relay.wait_for_swallowed();
        swtpm.power_off();
        relay.cut();
        let fault = killed.join().unwrap().unwrap_err();
        assert!(matches!(fault, TpmFault::Transport { .. }), "command {at}: {fault:?}");
    }
}

#[test]
fn a_busy_tpm_is_waited_for_and_one_that_stays_busy_is_a_fault() {
    if !ready(&[]) {
        return;
    }
    const RC_RETRY: u32 = 0x922;
    let swtpm = Swtpm::start().unwrap();
    // Every other command is put off once.
    let relay = Relay::start(&swtpm, |count| if count % 2 == 0 { Act::Answer(RC_RETRY) } else { Act::Pass });
    let mut tpm = relay.tpm();
    let key = tpm.load_key(KeyShape::Usual).unwrap();
    let question = binding("host-a", 1).qualifying_data();
    let evidence: Evidence = tpm.evidence(&key, &selection(&PCRS), &question, None).unwrap();
    assert!(!evidence.attest.as_slice().is_empty());
    drop(tpm);
    drop(relay);
    let relay = Relay::start(&swtpm, |_| Act::Answer(RC_RETRY));
    let options = Options { command_limit_ms: 200, key_limit_ms: 200, ..Options::default() };
    let mut tpm = Tpm::open(&relay.address(), options).unwrap();
    let fault = tpm.quote(&key, &selection(&PCRS), &question).unwrap_err();
    assert!(matches!(fault, TpmFault::Busy { code: RC_RETRY, attempts: 2.., .. }), "{fault:?}");
}

#[test]
fn a_tpm_that_says_nothing_is_a_fault_at_the_deadline() {
    if !ready(&[]) {
        return;
    }
    let swtpm = Swtpm::start().unwrap();
    let relay = Relay::start(&swtpm, |_| Act::Swallow);
    let options = Options { command_limit_ms: 200, ..Options::default() };
    let mut tpm = Tpm::open(&relay.address(), options).unwrap();
    let fault = tpm.read_clock().unwrap_err();
    assert!(matches!(fault, TpmFault::Transport { source: TransportFault::Deadline, .. }), "{fault:?}");
}

#[test]
fn registers_that_change_between_reading_and_quoting_are_read_again() {
    if !ready(&[]) {
        return;
    }
    const PCR_READ: [u8; 4] = [0, 0, 1, 0x7e];
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    let blobs = platform.tpm.create_ak().unwrap();
    platform.ak = platform.tpm.load_ak(&blobs).unwrap();
    platform.enrolled = support::enrol(&mut platform.tpm, &platform.ak);
    let Platform { swtpm, tpm, ak, enrolled, reference } = platform;
    drop((tpm, ak));
    // An extension slips in after the first reading, and after each.
    for (times, steady) in [(1, true), (usize::MAX, false)] {
        let mut left = times;
        let relay = Relay::start_watching(&swtpm, move |_, command| {
            let read = command.get(6..10) == Some(&PCR_READ[..]) && left > 0;
            left -= usize::from(read);
            if read { Act::PassAndExtend } else { Act::Pass }
        });
        let mut tpm = relay.tpm();
        let ak = tpm.load_ak(&blobs).unwrap();
        let outcome = tpm.evidence(&ak, &reference.selection(), &question.qualifying_data(), None);
        match outcome {
            Ok(evidence) => {
                assert!(
                    steady && evidence.pcrs.values()[&pcr(7)] != reference.pcrs()[&pcr(7)].allowed[0].digest
                );
            }
            Err(fault) => assert!(!steady && matches!(fault, TpmFault::Unsteady), "{fault:?}"),
        }
        tpm.unload_ak(ak).unwrap();
    }
    assert_eq!(enrolled.ak(), blobs.public());
}

/// What a relay does with a command.
enum Act {
    Pass,
    /// Gives it to the TPM and keeps the answer for ever.
    Swallow,
    /// Answers in its place.
    Answer(u32),
    /// Lets it through, and extends PCR 7 before the answer goes back.
    PassAndExtend,
}

/// Between a [`Tpm`] and its swtpm: a UNIX socket that does to each command what it is told.
struct Relay {
    path: PathBuf,
    control: UnixStream,
    swallowed: std::sync::mpsc::Receiver<()>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Relay {
    fn start(swtpm: &Swtpm, mut decide: impl FnMut(usize) -> Act + Send + 'static) -> Self {
        Self::start_watching(swtpm, move |count, _| decide(count))
    }

    fn start_watching(swtpm: &Swtpm, decide: impl FnMut(usize, &[u8]) -> Act + Send + 'static) -> Self {
        let Address::Unix(behind) = swtpm.address().clone() else { panic!("a UNIX socket") };
        let path = swtpm.folder().join(format!("relay-{:?}", Instant::now()).replace([' ', ':'], ""));
        let listener = UnixListener::bind(&path).unwrap();
        let (told, swallowed) = std::sync::mpsc::channel();
        let at = path.clone();
        // The relay's own end, through which it is cut.
        let (control, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let Ok((front, _)) = listener.accept() else { return };
            drop(std::fs::remove_file(&at));
            relay(front, &behind, decide, &told, &theirs);
        });
        Self { path, control, swallowed, thread: Some(thread) }
    }

    fn address(&self) -> Address {
        Address::Unix(self.path.clone())
    }

    fn tpm(&self) -> Tpm {
        Tpm::open(&self.address(), Options::default()).unwrap()
    }

    fn wait_for_swallowed(&self) {
        self.swallowed.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    /// Breaks both connections, and waits until they are.
    fn cut(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        drop(self.control.shutdown(std::net::Shutdown::Both));
        // Nobody may have connected: then this does, so that the thread ends.
        drop(UnixStream::connect(&self.path));
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking());
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.finish();
    }
}

fn relay(
    mut front: UnixStream,
    behind: &Path,
    mut decide: impl FnMut(usize, &[u8]) -> Act,
    told: &std::sync::mpsc::Sender<()>,
    control: &UnixStream,
) {
    let mut back = UnixStream::connect(behind).unwrap();
    for count in 0.. {
        // A command, or the end.
        let mut first = [0];
        if !readable(&front, control) || !matches!(front.read(&mut first), Ok(1)) {
            return;
        }
        let Some(command) = message(&mut front, first[0]) else { return };
        match decide(count, &command) {
            Act::Answer(code) => {
                let answer = [&[0x80, 1, 0, 0, 0, 10][..], &code.to_be_bytes()].concat();
                front.write_all(&answer).unwrap();
            }
            Act::Swallow => {
                back.write_all(&command).unwrap();
                told.send(()).unwrap();
                readable(control, control);
                return;
            }
            act => {
                back.write_all(&command).unwrap();
                let mut first = [0];
                if !matches!(back.read(&mut first), Ok(1)) {
                    return;
                }
                let Some(answer) = message(&mut back, first[0]) else { return };
                if matches!(act, Act::PassAndExtend) {
                    extend(&mut back);
                }
                front.write_all(&answer).unwrap();
            }
        }
    }
}

/// Extends PCR 7 over the relay's own connection.
fn extend(back: &mut UnixStream) {
    let digest = digest(Bank::Sha256, b"in between");
    // Tag, size to be set, code, PCR 7, an authorisation by the empty password, one digest of SHA-256.
    let head = "8002 00000000 00000182 00000007 00000009 40000009 0000 00 0000 00000001 000b";
    let mut command = hex::decode(head.replace(' ', "")).unwrap();
    command.extend(digest.as_bytes());
    let size = u32::try_from(command.len()).unwrap().to_be_bytes();
    command[2..6].copy_from_slice(&size);
    back.write_all(&command).unwrap();
    let mut first = [0];
    back.read_exact(&mut first).unwrap();
    let answer = message(back, first[0]).unwrap();
    assert_eq!(answer[6..10], [0; 4], "extended");
}

/// A command or response, of which the first byte was read.
fn message(from: &mut UnixStream, first: u8) -> Option<Vec<u8>> {
    let mut head = [0; 5];
    from.read_exact(&mut head).ok()?;
    let size = usize::try_from(u32::from_be_bytes(head[1..].try_into().unwrap())).unwrap();
    let mut rest = vec![0; size - 6];
    from.read_exact(&mut rest).ok()?;
    Some([&[first][..], &head, &rest].concat())
}

/// Waits until `stream` can be read; not so when `control` was shut first.
fn readable(stream: &UnixStream, control: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut both = [PollFd::new(stream, PollFlags::IN), PollFd::new(control, PollFlags::IN)];
    poll(&mut both, None).unwrap();
    both[1].revents().is_empty()
}
