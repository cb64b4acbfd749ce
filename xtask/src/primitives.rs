//! The primitives of the hand-over are named only where the hand-over machine's effects are executed.
//!
//! Whoever freezes, thaws, continues or kills a QEMU, or moves a VM's location, outside these modules can make
//! a VM run twice or not at all without the machine noticing.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::run::Workspace;

/// What is looked for, what it does, and the folders or files (below `crates/`) that may name it.
struct Primitive {
    text: &'static str,
    does: &'static str,
    allowed: &'static [&'static str],
}

/// Freezing and thawing: nowhere but here.
const FREEZER: &[&str] = &["host/src/freezer.rs", "host/src/cgroup.rs", "host/src/process.rs"];
/// Ending processes: the hand-over's effects; a half-started QEMU that never ran; a VM agent, which is no QEMU.
const KILLERS: &[&str] = &[
    "host/src/process.rs",
    "host/src/cgroup.rs",
    "host/src/freezer.rs",
    "host/src/migration/",
    "host/src/vms/",
    "host/src/agents.rs",
    "host/src/scanner.rs",
    "host/src/sweep.rs",
];
/// Ending all that is in a group: half-started QEMUs, agents, scanners, dry runs; never a QEMU that may hold a guest.
const SWEEPERS: &[&str] = &[
    "host/src/sweep.rs",
    "host/src/agents.rs",
    "host/src/scanner.rs",
    "host/src/vms/mod.rs",
    "host/src/qemu/catalogue/",
];
/// Letting a guest run: the hand-over's effects, and the first start of a VM.
const MONITOR: &[&str] =
    &["host/src/migration/hypervisor.rs", "host/src/migration/target.rs", "host/src/vms/mod.rs"];

/// Moving a VM's location, which is what a commit does.
const DECIDER: &[&str] = &["manager/src/migration/handover.rs", "registry/src/vms.rs"];

const PRIMITIVES: [Primitive; 13] = [
    primitive("cgroup.freeze", "freezes or thaws (v2)", FREEZER),
    primitive("freezer.state", "freezes or thaws (v1)", FREEZER),
    primitive("Signal::STOP", "freezes", FREEZER),
    primitive("Signal::CONT", "thaws", FREEZER),
    primitive("cgroup.kill", "kills", KILLERS),
    primitive("Signal::KILL", "kills", KILLERS),
    primitive("pidfd_send_signal", "kills", KILLERS),
    primitive("sweep::end_all", "kills", SWEEPERS),
    primitive("sweep::end_orphans", "kills", SWEEPERS),
    primitive("sweep::end_process", "kills", SWEEPERS),
    primitive("\"cont\"", "continues a guest", MONITOR),
    primitive("relocate_vm", "commits", DECIDER),
    primitive("\"system_reset\"", "resets a guest", MONITOR),
];

const fn primitive(text: &'static str, does: &'static str, allowed: &'static [&'static str]) -> Primitive {
    Primitive { text, does, allowed }
}

/// Looks through the product's sources; tests and comments may name what they like.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let crates = workspace.root.join("crates");
    let mut wrong = Vec::new();
    for path in sources(&crates)? {
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let place = path.strip_prefix(&crates).unwrap_or(&path).to_string_lossy().into_owned();
        wrong.extend(violations(&place, &text));
    }
    ensure!(wrong.is_empty(), "\n  {}", wrong.join("\n  "));
    Ok(())
}

fn violations(place: &str, text: &str) -> Vec<String> {
    let product = text.lines().take_while(|line| line.trim() != "#[cfg(test)]");
    let mut wrong = Vec::new();
    for (line, number) in product.zip(1..) {
        let code = line.split("//").next().unwrap_or_default();
        for primitive in PRIMITIVES.iter().filter(|primitive| code.contains(primitive.text)) {
            if !primitive.allowed.iter().any(|allowed| place.starts_with(allowed)) {
                let (text, does) = (primitive.text, primitive.does);
                wrong.push(format!(
                    "crates/{place}:{number}: {text} {does}: only the hand-over's effects may"
                ));
            }
        }
    }
    wrong
}

/// Every source file below `src` folders.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        let entries = fs::read_dir(&next).with_context(|| format!("listing {}", next.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("listing {}", next.display()))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") && is_product(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn is_product(path: &Path) -> bool {
    let is_test = path.file_name().is_some_and(|name| name == "tests.rs");
    !is_test && path.components().any(|part| part.as_os_str() == "src")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primitive_is_found_outside_its_modules_only() {
        let check =
            |place, text, expect: usize| assert_eq!(violations(place, text).len(), expect, "{place}: {text}");
        check("manager/src/http.rs", "qmp.execute(\"cont\")", 1);
        check("host/src/migration/hypervisor.rs", "qmp.execute(\"cont\")", 0);
        check("manager/src/http.rs", "// never \"cont\" here", 0);
        check("manager/src/http.rs", "#[cfg(test)]\nmod tests { \"cont\" }", 0);
        check("agent/src/main.rs", "kill_process(pid, Signal::KILL)", 1);
    }
}
