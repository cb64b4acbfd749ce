//! Commands and responses (Part 1, "Command/Response Structure"; Part 3), and patience with a TPM that is
//! busy.

use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::transport::{RESPONSE_LIMIT_BYTES, Transport, TransportFault};
use crate::codec::{Malformed, Reader, Writer};

/// Command codes (Part 2, 6.5.2), handles (7.4), capabilities (6.12) and response codes (6.6.3).
pub(crate) mod code {
    pub(crate) const CREATE_PRIMARY: u32 = 0x0131;
    pub(crate) const ACTIVATE_CREDENTIAL: u32 = 0x0147;
    pub(crate) const NV_READ: u32 = 0x014E;
    pub(crate) const POLICY_SECRET: u32 = 0x0151;
    pub(crate) const CREATE: u32 = 0x0153;
    pub(crate) const LOAD: u32 = 0x0157;
    pub(crate) const QUOTE: u32 = 0x0158;
    pub(crate) const FLUSH_CONTEXT: u32 = 0x0165;
    pub(crate) const NV_READ_PUBLIC: u32 = 0x0169;
    pub(crate) const READ_PUBLIC: u32 = 0x0173;
    pub(crate) const START_AUTH_SESSION: u32 = 0x0176;
    pub(crate) const GET_CAPABILITY: u32 = 0x017A;
    pub(crate) const PCR_READ: u32 = 0x017E;
    pub(crate) const READ_CLOCK: u32 = 0x0181;

    pub(crate) const RH_NULL: u32 = 0x4000_0007;
    pub(crate) const RS_PW: u32 = 0x4000_0009;
    pub(crate) const TRANSIENT_FIRST: u32 = 0x8000_0000;
    pub(crate) const LOADED_SESSION_FIRST: u32 = 0x0200_0000;
    pub(crate) const CAP_HANDLES: u32 = 1;

    /// The first handle does not exist.
    pub(crate) const RC_HANDLE_1: u32 = 0x018B;
    pub(crate) const RC_YIELDED: u32 = 0x0908;
    pub(crate) const RC_TESTING: u32 = 0x090A;
    pub(crate) const RC_RETRY: u32 = 0x0922;
}

const ST_NO_SESSIONS: u16 = 0x8001;
const ST_SESSIONS: u16 = 0x8002;
/// Tag, size and code.
const HEADER_BYTES: usize = 10;
/// The first pause before a command is sent again; it doubles up to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// What went wrong with a TPM.
#[derive(Debug, thiserror::Error)]
pub enum TpmFault {
    /// It could not be reached, or did not answer in time.
    #[error("{command}: the TPM could not be asked")]
    Transport {
        /// The command.
        command: &'static str,
        /// Why.
        #[source]
        source: TransportFault,
    },
    /// It answered "later" until the deadline.
    #[error("{command}: the TPM is busy (answer {code:#05x}, asked {attempts} times); try again later")]
    Busy {
        /// The command.
        command: &'static str,
        /// The last answer.
        code: u32,
        /// How often it was asked.
        attempts: u32,
    },
    /// It refused.
    #[error("{command}: the TPM refused with {code:#05x}{}", hint(*code))]
    Refused {
        /// The command.
        command: &'static str,
        /// Its response code (Part 2, 6.6).
        code: u32,
    },
    /// Its answer is not one.
    #[error("{command}: the TPM's answer can't be read")]
    Malformed {
        /// The command.
        command: &'static str,
        /// Why.
        #[source]
        source: Malformed,
    },
    /// Its registers changed each time between quote and reading.
    #[error("the TPM's registers change faster than they can be quoted; what on this host extends them?")]
    Unsteady,
}

impl TpmFault {
    pub(super) fn opening(source: TransportFault) -> Self {
        Self::Transport { command: "opening", source }
    }

    /// The TPM's response code, if it refused.
    #[must_use]
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Refused { code, .. } | Self::Busy { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// What an operator can do about the codes that are met in practice.
fn hint(code: u32) -> &'static str {
    // A code of format one carries the number of the handle, session or parameter that it is about (Part 2,
    // 6.6.2).
    let kind = if code & 0x80 != 0 { code & 0xBF } else { code };
    match kind {
        0x0100 => " (it was not started: TPM2_Startup is missing)",
        0x0101 => " (it is in failure mode: its state can't be read, or its self-test failed)",
        0x0902..=0x0904 => " (its memory is full of objects or sessions that others left loaded)",
        0x0921 => " (it is locked after wrong passwords)",
        0x0923 | 0x0920 => " (its permanent memory is not available now)",
        0x008B | 0x0910..=0x0916 => " (the object is not loaded: was the TPM reset?)",
        0x008E | 0x00A2 => " (wrong password)",
        0x009D => " (its policy is not satisfied)",
        0x009F => " (the data are not of this TPM, or it was cleared since)",
        _ => "",
    }
}

/// Who authorises the use of a handle.
enum Authority {
    Password(Zeroizing<Vec<u8>>),
    /// A policy session that is satisfied; nothing else is proved with it, so its HMAC is empty (Part 1,
    /// "Policy Session").
    Policy(u32),
}

/// A command that is being made.
pub(crate) struct Command {
    name: &'static str,
    code: u32,
    handles: Vec<u32>,
    authorities: Vec<Authority>,
    parameters: Zeroizing<Vec<u8>>,
}

impl Command {
    pub(crate) fn new(name: &'static str, code: u32) -> Self {
        let parameters = Zeroizing::default();
        Self { name, code, handles: Vec::new(), authorities: Vec::new(), parameters }
    }

    pub(crate) fn handle(mut self, handle: u32) -> Self {
        self.handles.push(handle);
        self
    }

    /// A handle that is used with a password.
    pub(crate) fn with_password(mut self, handle: u32, password: &[u8]) -> Self {
        self.authorities.push(Authority::Password(Zeroizing::new(password.to_vec())));
        self.handle(handle)
    }

    /// A handle that is used under a policy session.
    pub(super) fn with_policy(mut self, handle: u32, session: u32) -> Self {
        self.authorities.push(Authority::Policy(session));
        self.handle(handle)
    }

    pub(crate) fn parameters(mut self, write: impl FnOnce(Writer) -> Writer) -> Self {
        self.parameters = Zeroizing::new(write(Writer::new()).done());
        self
    }

    fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let tag = if self.authorities.is_empty() { ST_NO_SESSIONS } else { ST_SESSIONS };
        let mut body = self.handles.iter().fold(Writer::new(), |to, handle| to.u32(*handle));
        if !self.authorities.is_empty() {
            body = body.long(&authorization(&self.authorities));
        }
        let body = Zeroizing::new(body.raw(&self.parameters).done());
        let size = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
        Zeroizing::new(Writer::new().u16(tag).u32(size).u32(self.code).raw(&body).done())
    }
}

/// The authorisation area (same place): of each session its handle, nonce, attributes and HMAC or password.
/// Sessions stay for an explicit flush, so that there is one way in which they end.
fn authorization(authorities: &[Authority]) -> Zeroizing<Vec<u8>> {
    const CONTINUE_SESSION: u8 = 1;
    let write = |to: Writer, authority: &Authority| match authority {
        Authority::Password(password) => to.u32(code::RS_PW).sized(&[]).u8(0).sized(password),
        Authority::Policy(session) => to.u32(*session).sized(&[]).u8(CONTINUE_SESSION).sized(&[]),
    };
    Zeroizing::new(authorities.iter().fold(Writer::new(), write).done())
}

/// A good response: what follows its header.
pub(crate) struct Response {
    command: &'static str,
    body: Zeroizing<Vec<u8>>,
    sessions: bool,
}

impl Response {
    /// Reads a response without handle.
    pub(crate) fn read<R>(
        self,
        parse: impl FnOnce(&mut Reader<'_>) -> Result<R, Malformed>,
    ) -> Result<R, TpmFault> {
        self.parse(|from, sessions| parameters(from, sessions, parse))
    }

    /// Reads a response that begins with a handle.
    pub(crate) fn read_handle<R>(
        self,
        parse: impl FnOnce(&mut Reader<'_>) -> Result<R, Malformed>,
    ) -> Result<(u32, R), TpmFault> {
        self.parse(|from, sessions| Ok((from.u32("handle")?, parameters(from, sessions, parse)?)))
    }

    fn parse<R>(
        &self,
        parse: impl FnOnce(&mut Reader<'_>, bool) -> Result<R, Malformed>,
    ) -> Result<R, TpmFault> {
        let malformed = |source| TpmFault::Malformed { command: self.command, source };
        parse(&mut Reader::new(&self.body), self.sessions).map_err(malformed)
    }
}

/// The parameters, all of them; after them the session area, which has nothing that is needed here.
fn parameters<R>(
    from: &mut Reader<'_>,
    sessions: bool,
    parse: impl FnOnce(&mut Reader<'_>) -> Result<R, Malformed>,
) -> Result<R, Malformed> {
    let mut inner = match sessions {
        true => Reader::new(from.long(RESPONSE_LIMIT_BYTES, "parameters")?),
        false => from.clone(),
    };
    let parsed = parse(&mut inner)?;
    inner.finish("the response")?;
    Ok(parsed)
}

/// Sends a command, again while the TPM says so, until the deadline.
pub(super) fn run(
    transport: &mut dyn Transport,
    command: &Command,
    deadline: Instant,
) -> Result<Response, TpmFault> {
    let name = command.name;
    let bytes = command.to_bytes();
    let mut pause = FIRST_PAUSE;
    for attempts in 1.. {
        let sent = transport.transact(&bytes, deadline);
        let answer = sent.map_err(|source| TpmFault::Transport { command: name, source })?;
        let (code, response) =
            parse(name, answer).map_err(|source| TpmFault::Malformed { command: name, source })?;
        match code {
            0 => return Ok(response),
            code::RC_RETRY | code::RC_TESTING | code::RC_YIELDED => {
                if Instant::now() + pause >= deadline {
                    return Err(TpmFault::Busy { command: name, code, attempts });
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            code => return Err(TpmFault::Refused { command: name, code }),
        }
    }
    // More attempts than a number holds: the deadline ended them long before.
    Err(TpmFault::Busy { command: name, code: code::RC_RETRY, attempts: u32::MAX })
}

fn parse(command: &'static str, answer: Zeroizing<Vec<u8>>) -> Result<(u32, Response), Malformed> {
    let mut from = Reader::new(&answer);
    let tag = from.u16("tag")?;
    let size = from.u32("responseSize")?;
    let code = from.u32("responseCode")?;
    if usize::try_from(size) != Ok(answer.len()) {
        return Err(Malformed::Unaccepted { what: "responseSize", found: size.into() });
    }
    if tag != ST_NO_SESSIONS && tag != ST_SESSIONS {
        return Err(Malformed::Unaccepted { what: "tag", found: tag.into() });
    }
    let body = Zeroizing::new(answer.get(HEADER_BYTES..).unwrap_or_default().to_vec());
    Ok((code, Response { command, body, sessions: tag == ST_SESSIONS }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A TPM that gives the same answer for ever, and counts how often.
    struct Always(Vec<u8>, std::sync::Arc<std::sync::atomic::AtomicU32>);

    impl Transport for Always {
        fn transact(&mut self, _: &[u8], _: Instant) -> Result<Zeroizing<Vec<u8>>, TransportFault> {
            self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(Zeroizing::new(self.0.clone()))
        }
    }

    fn answer(tag: u16, code: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        Writer::new().u16(tag).u32(size).u32(code).raw(body).done()
    }

    fn ask(answer: Vec<u8>, limit_ms: u64) -> (Result<u32, TpmFault>, u32, Duration) {
        let count = std::sync::Arc::default();
        let mut transport = Always(answer, std::sync::Arc::clone(&count));
        let start = Instant::now();
        let command = Command::new("TPM2_Test", code::READ_CLOCK);
        let outcome = run(&mut transport, &command, start + Duration::from_millis(limit_ms));
        let outcome = outcome.and_then(|response| response.read(|from| from.u32("value")));
        (outcome, count.load(std::sync::atomic::Ordering::Relaxed), start.elapsed())
    }

    #[test]
    fn a_busy_tpm_is_asked_again_until_the_deadline_and_never_passes() {
        for code in [code::RC_RETRY, code::RC_TESTING, code::RC_YIELDED] {
            let (outcome, asked, took) = ask(answer(ST_NO_SESSIONS, code, &[]), 100);
            assert!(
                matches!(outcome, Err(TpmFault::Busy { code: found, .. }) if found == code),
                "{outcome:?}"
            );
            assert!((2..50).contains(&asked), "asked {asked} times");
            // Generous, for a machine under load; what must not be is an endless wait.
            assert!(took < Duration::from_secs(5), "{took:?}");
        }
    }

    #[test]
    fn other_codes_are_refusals_at_once() {
        let (outcome, asked, _) = ask(answer(ST_NO_SESSIONS, 0x0101, &[]), 100);
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains("0x101") && text.contains("failure mode"), "{text}");
        assert_eq!(asked, 1);
    }

    #[test]
    fn answers_that_are_not_one_are_refused() {
        let good = answer(ST_NO_SESSIONS, 0, &[0, 0, 0, 7]);
        assert_eq!(ask(good.clone(), 100).0.unwrap(), 7);
        let sessions = answer(ST_SESSIONS, 0, &[0, 0, 0, 4, 0, 0, 0, 7, 0, 0, 1, 0, 0]);
        assert_eq!(ask(sessions, 100).0.unwrap(), 7);
        let longer = [good.clone(), vec![0]].concat();
        let trailing = answer(ST_NO_SESSIONS, 0, &[0, 0, 0, 7, 0]);
        let beyond = answer(ST_SESSIONS, 0, &[0, 0, 0, 9, 0, 0, 0, 7]);
        let short = answer(ST_NO_SESSIONS, 0, &[0, 0]);
        let other_tag = answer(0x00c4, 0, &[0, 0, 0, 7]);
        for bad in [longer, trailing, beyond, short, other_tag, Vec::new(), good[..9].to_vec()] {
            let (outcome, _, _) = ask(bad.clone(), 100);
            assert!(matches!(outcome, Err(TpmFault::Malformed { .. })), "{bad:?}: {outcome:?}");
        }
    }
}
