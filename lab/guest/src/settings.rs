//! What the kernel command line asks of the guest: `outrider.NAME=VALUE` words.

use anyhow::{Context, Result, bail};

use crate::page;

/// Everything that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// TCP port of the service.
    pub port: u16,
    /// Magic of the counter page; `None` takes it from the VM's UUID.
    pub magic: Option<[u8; page::MAGIC_BYTES]>,
    /// Planted secret; `None` makes a random one.
    pub secret: Option<String>,
    /// Memory filled with random data, in MiB.
    pub fill_mib: usize,
    /// Working set of the dirtier, in MiB.
    pub working_set_mib: usize,
    /// Rate of the dirtier, in MiB per second.
    pub rate_mib_per_s: u64,
    /// Block device written with sequence numbers, and the pause between two writes.
    pub disk: Option<DiskSettings>,
}

/// How the disk is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSettings {
    /// Device to write.
    pub path: String,
    /// Pause between two writes, in milliseconds.
    pub interval_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 7,
            magic: None,
            secret: None,
            fill_mib: 0,
            working_set_mib: 0,
            rate_mib_per_s: 0,
            disk: None,
        }
    }
}

impl Settings {
    /// Reads the words that are ours; other words belong to the kernel and are passed over.
    pub fn parse(command_line: &str) -> Result<Self> {
        let mut settings = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("outrider.").and_then(|w| w.split_once('=')) else {
                continue;
            };
            settings.set(name, value).with_context(|| format!("reading outrider.{name}={value}"))?;
        }
        Ok(settings)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "port" => self.port = value.parse()?,
            "magic" => self.magic = Some(page::parse_hex(value).context("64 hexadecimal digits are needed")?),
            "secret" => self.secret = Some(value.to_owned()),
            "fill" => self.fill_mib = value.parse()?,
            "ws" => self.working_set_mib = value.parse()?,
            "rate" => self.rate_mib_per_s = value.parse()?,
            "disk" => self.disk_mut().path = value.to_owned(),
            "disk_ms" => self.disk_mut().interval_ms = value.parse()?,
            // `ip` is read by the init script.
            "ip" => {}
            _ => bail!("there is no such setting"),
        }
        Ok(())
    }

    fn disk_mut(&mut self) -> &mut DiskSettings {
        self.disk.get_or_insert_with(|| DiskSettings { path: "/dev/vda".to_owned(), interval_ms: 10 })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn our_words_are_read_and_the_kernels_are_passed_over() {
        let line = "console=ttyS0 quiet outrider.port=9 outrider.fill=64 outrider.ip=10.0.0.1/24 outrider.disk=/dev/vdb";
        let expect = Settings {
            port: 9,
            fill_mib: 64,
            disk: Some(DiskSettings { path: "/dev/vdb".to_owned(), interval_ms: 10 }),
            ..Settings::default()
        };
        assert_eq!(Settings::parse(line).unwrap(), expect);
    }

    #[test]
    fn a_mistyped_setting_is_an_error() {
        assert!(Settings::parse("outrider.prot=7").is_err());
        assert!(Settings::parse("outrider.magic=00").is_err());
    }
}
