//! The host's half: asks a TPM, within deadlines, and leaves nothing behind in it.
//!
//! | act | what the host does with it |
//! |---|---|
//! | [`Tpm::ek`], [`Tpm::ek_certificate`] | shows at the join |
//! | [`Tpm::create_ak`] | once; keeps [`AkBlobs`] in a file of mode 0600 |
//! | [`Tpm::activate_credential`] | answers the manager's challenge at the join |
//! | [`Tpm::load_ak`], [`Tpm::evidence`] | answers the manager's questions |
//! | [`event_log()`] | sends along, so that a mismatch can be explained |
//!
//! All calls block, each for at most its number of commands times the deadline of one. A transport that
//! failed in the middle of a command is not used again: open a new [`Tpm`]. Objects and sessions are flushed
//! after each act whatever happened, and what a caller holds (a loaded key) at the latest when the `Tpm` is
//! dropped.

pub(crate) mod command;
mod event_log;
mod keys;
pub(crate) mod quote;
pub(crate) mod template;
mod transport;

use std::time::{Duration, Instant};

use zeroize::Zeroizing;

pub use command::TpmFault;
pub use event_log::{EventLogFault, PLATFORM_EVENT_LOG, event_log};
pub use keys::{AkBlobs, AkBlobsFault, LoadedAk};
pub use quote::Quote;
pub use template::Kind as EkKind;
pub use transport::{Address, RESPONSE_LIMIT_BYTES, Transport, TransportFault, open};

use command::{Command, Response, code};

/// How a TPM is used.
#[derive(Clone)]
pub struct Options {
    /// How long one command may take, retries included, milliseconds.
    pub command_limit_ms: u64,
    /// The same for one that makes a key: discrete TPMs take up to half a minute for RSA.
    pub key_limit_ms: u64,
    /// Which endorsement key identifies the TPM.
    pub ek: EkKind,
    /// The password of the endorsement hierarchy; empty unless the platform's owner set one.
    pub endorsement_password: Zeroizing<Vec<u8>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            command_limit_ms: 5_000,
            key_limit_ms: 60_000,
            ek: EkKind::Rsa2048,
            endorsement_password: Zeroizing::default(),
        }
    }
}

/// A TPM.
pub struct Tpm {
    transport: Box<dyn Transport>,
    options: Options,
    /// What is loaded and not yet flushed.
    open: Vec<u32>,
}

/// Nobody waits longer for the TPM to let go of something.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

impl Tpm {
    /// Opens a TPM.
    ///
    /// # Errors
    /// [`TpmFault::Transport`].
    pub fn open(address: &Address, options: Options) -> Result<Self, TpmFault> {
        let deadline = Instant::now() + Duration::from_millis(options.command_limit_ms);
        let transport = open(address, deadline).map_err(TpmFault::opening)?;
        Ok(Self::over(transport, options))
    }

    /// A TPM over any transport.
    #[must_use]
    pub fn over(transport: Box<dyn Transport>, options: Options) -> Self {
        Self { transport, options, open: Vec::new() }
    }

    /// Flushes what a predecessor left loaded: after a crash of whoever used this TPM before. Only for a TPM
    /// that nobody else uses: behind `/dev/tpmrm0` the kernel does it by itself.
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn flush_stale(&mut self) -> Result<usize, TpmFault> {
        let mut flushed = 0;
        for range in [code::TRANSIENT_FIRST, code::LOADED_SESSION_FIRST] {
            for handle in self.handles(range)? {
                self.flush(handle)?;
                flushed += 1;
            }
        }
        Ok(flushed)
    }

    fn handles(&mut self, first: u32) -> Result<Vec<u32>, TpmFault> {
        const HANDLES_LIMIT: u32 = 64;
        let command = Command::new("TPM2_GetCapability", code::GET_CAPABILITY);
        let command = command.parameters(|to| to.u32(code::CAP_HANDLES).u32(first).u32(HANDLES_LIMIT));
        self.run(&command)?.read(|from| {
            from.take(5, "moreData and capability")?;
            let count = from.u32("count")?.min(HANDLES_LIMIT);
            (0..count).map(|_| from.u32("handle")).collect()
        })
    }

    pub(crate) fn run(&mut self, command: &Command) -> Result<Response, TpmFault> {
        self.run_within(command, Duration::from_millis(self.options.command_limit_ms))
    }

    /// Runs a command that makes a key.
    pub(crate) fn run_long(&mut self, command: &Command) -> Result<Response, TpmFault> {
        self.run_within(command, Duration::from_millis(self.options.key_limit_ms))
    }

    fn run_within(&mut self, command: &Command, limit: Duration) -> Result<Response, TpmFault> {
        command::run(self.transport.as_mut(), command, Instant::now() + limit)
    }

    /// Notes that `handle` is loaded.
    pub(crate) fn opened(&mut self, handle: u32) -> u32 {
        self.open.push(handle);
        handle
    }

    fn flush(&mut self, handle: u32) -> Result<(), TpmFault> {
        self.open.retain(|open| *open != handle);
        let command = Command::new("TPM2_FlushContext", code::FLUSH_CONTEXT).parameters(|to| to.u32(handle));
        self.run_within(&command, FLUSH_LIMIT).map(|_| ())
    }

    /// Acts with `handle` and flushes it whatever comes of it. What the act says goes before what the flush
    /// says.
    fn and_flush<R>(
        &mut self,
        handle: u32,
        act: impl FnOnce(&mut Self) -> Result<R, TpmFault>,
    ) -> Result<R, TpmFault> {
        let outcome = act(self);
        let flushed = self.flush(handle);
        let outcome = outcome?;
        flushed.map(|()| outcome)
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        while let Some(handle) = self.open.pop() {
            if self.flush(handle).is_err() {
                // Gone or stuck: each further one would wait in vain. `flush_stale` is for what stays.
                return;
            }
        }
    }
}

impl std::fmt::Debug for Tpm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tpm").field("open", &self.open).finish_non_exhaustive()
    }
}
