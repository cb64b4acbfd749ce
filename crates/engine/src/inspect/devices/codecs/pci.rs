//! A PCI device's configuration space: what a guest can't change must be what the target's own device has (INV-D7).

use crate::inspect::devices::rule::Breach;

/// Ends a list of capabilities that goes round in circles.
const MAX_CAPABILITIES: usize = 64;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_EXTENDED: usize = 0x100;

const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;
const EXT_SRIOV: u16 = 0x0010;

/// Name, start and length of what is the same for a device's whole life.
const IDENTITY: [(&str, usize, usize); 6] = [
    ("vendor and device", 0x00, 4),
    ("revision", 0x08, 1),
    ("class", 0x0a, 2),
    ("header type", 0x0e, 1),
    ("first capability", CAPABILITY_POINTER, 1),
    ("interrupt pin", 0x3d, 1),
];

type Found = Result<(), (&'static str, usize, Breach)>;

/// Compares a configuration space with the dry run's, whose zeros at the end may be left out.
pub(in crate::inspect::devices) fn check(config: &[u8], dry_run: &[u8]) -> Found {
    let pair = Pair { config, dry_run };
    for (what, at, length) in IDENTITY {
        pair.same(what, at, length)?;
    }
    let bridge = pair.expected(0x0e) & 0x7f == 1;
    if !bridge {
        pair.same("subsystem", 0x2c, 4)?;
    }
    pair.bars(if bridge { 2 } else { 6 })?;
    pair.capabilities()?;
    pair.extended_capabilities()
}

/// Entries of the MSI-X table that a configuration space announces.
pub(in crate::inspect::devices) fn msix_entries(config: &[u8]) -> Option<u16> {
    let pair = Pair { config, dry_run: config };
    let at = pair.capability_places().find(|at| pair.expected(*at) == CAP_MSIX)?;
    let control = u16::from_le_bytes([pair.expected(at + 2), pair.expected(at + 3)]);
    Some((control & 0x7ff) + 1)
}

struct Pair<'a> {
    config: &'a [u8],
    dry_run: &'a [u8],
}

impl Pair<'_> {
    fn expected(&self, at: usize) -> u8 {
        self.dry_run.get(at).copied().unwrap_or(0)
    }

    fn held(&self, at: usize) -> u8 {
        self.config.get(at).copied().unwrap_or(0)
    }

    fn held16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.held(at), self.held(at + 1)])
    }

    fn same_under(&self, what: &str, at: usize, mask: u8) -> Found {
        let (expected, found) = (self.expected(at) & mask, self.held(at) & mask);
        if expected == found {
            return Ok(());
        }
        let expected = format!("{expected:#04x} at {at:#x} ({what}), as on the target");
        Err(("INV-D7", at, Breach { expected, found: format!("{found:#04x}") }))
    }

    fn same(&self, what: &str, at: usize, length: usize) -> Found {
        (at..at + length).try_for_each(|at| self.same_under(what, at, 0xff))
    }

    /// The type bits of each base address; the upper half of a 64-bit one has none.
    fn bars(&self, count: usize) -> Found {
        let mut bar = 0;
        while bar < count {
            let at = 0x10 + 4 * bar;
            let kind = self.expected(at);
            self.same_under("type of a base address", at, if kind & 1 == 1 { 0x3 } else { 0xf })?;
            bar += if kind & 0x7 == 4 { 2 } else { 1 };
        }
        Ok(())
    }

    /// Where the dry run's capabilities are.
    fn capability_places(&self) -> impl Iterator<Item = usize> {
        let mut next = usize::from(self.expected(CAPABILITY_POINTER));
        std::iter::from_fn(move || {
            let at = next;
            next = usize::from(self.expected(at + 1));
            (at >= 0x40).then_some(at)
        })
        .take(MAX_CAPABILITIES)
    }

    fn capabilities(&self) -> Found {
        for at in self.capability_places() {
            self.same("capability", at, 2)?;
            match self.expected(at) {
                CAP_EXPRESS => self.same("kind of express device", at + 2, 2)?,
                CAP_MSIX => {
                    self.same_under("MSI-X table size", at + 2, 0xff)?;
                    self.same_under("MSI-X table size", at + 3, 0x07)?;
                    self.same("MSI-X table", at + 4, 8)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn extended_capabilities(&self) -> Found {
        let mut at = FIRST_EXTENDED;
        for _ in 0..MAX_CAPABILITIES {
            if at < FIRST_EXTENDED || at + 4 > self.config.len() {
                return Ok(());
            }
            self.same("extended capability", at, 4)?;
            let id = u16::from_le_bytes([self.expected(at), self.expected(at + 1)]);
            if id == EXT_SRIOV {
                self.virtual_functions(at)?;
            }
            let next = u16::from_le_bytes([self.expected(at + 2), self.expected(at + 3)]) >> 4;
            at = usize::from(next);
        }
        Ok(())
    }

    fn virtual_functions(&self, at: usize) -> Found {
        self.same("initial and total virtual functions", at + 0x0c, 4)?;
        let (total, wanted) = (self.held16(at + 0x0e), self.held16(at + 0x10));
        if wanted <= total {
            return Ok(());
        }
        let expected = format!("at most {total} virtual functions");
        Err(("INV-D7", at + 0x10, Breach { expected, found: wanted.to_string() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An express device with MSI-X at 0x40 and SR-IOV at 0x100.
    fn device() -> Vec<u8> {
        let mut config = vec![0u8; 4096];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        config[0x10..0x1c].copy_from_slice(&[1, 0xc0, 0, 0, 0, 0, 0, 0, 0x0c, 0, 0, 0]);
        config[0x34] = 0x40;
        config[0x40..0x44].copy_from_slice(&[CAP_MSIX, 0, 3, 0]);
        config[0x100..0x104].copy_from_slice(&[0x10, 0, 1, 0]);
        config[0x10c..0x110].copy_from_slice(&[8, 0, 8, 0]);
        config
    }

    fn check_change(at: usize, value: u8, good: bool) {
        let mut config = device();
        config[at] = value;
        let found = check(&config, &device());
        assert_eq!(found.is_ok(), good, "{at:#x} = {value:#x}: {found:?}");
    }

    #[test]
    fn a_guest_may_change_addresses_and_controls_but_not_the_identity() {
        check_change(0x04, 7, true);
        check_change(0x11, 0x10, true);
        check_change(0x1c, 0xff, true);
        check_change(0x43, 0x80, true);
        check_change(0x110, 8, true);
        check_change(0x00, 0, false);
        check_change(0x0a, 1, false);
        check_change(0x10, 0, false);
        check_change(0x18, 0x04, false);
        check_change(0x34, 0, false);
        check_change(0x41, 0x50, false);
        check_change(0x42, 4, false);
        check_change(0x110, 9, false);
        check_change(0x10e, 9, false);
    }

    #[test]
    fn lists_that_go_round_end() {
        let mut config = device();
        config[0x41] = 0x40;
        config[0x103] = 0x10;
        assert!(check(&config, &config.clone()).is_ok());
        assert_eq!(msix_entries(&device()), Some(4));
    }
}
