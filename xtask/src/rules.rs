//! Every rule of the inspector is cited where it is enforced and where it is tested.
//!
//! The list is the table of docs/inspector.md: a rule that is added there without code, or code that loses its test, is
//! found here.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::run::Workspace;

const TABLE: &str = "docs/inspector.md";
/// Where rules are enforced; `tests` folders and `tests` modules inside count as tests.
const ROOMS: [&str; 5] = ["crates/wire", "crates/engine", "crates/agent", "crates/link", "crates/host"];

/// Where a rule is cited.
#[derive(Debug, Default, Clone, Copy)]
struct Cited {
    code: bool,
    test: bool,
}

/// Compares the table with the sources.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let path = workspace.root.join(TABLE);
    let table = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut rules: BTreeMap<&str, Cited> = rules_of(&table).map(|rule| (rule, Cited::default())).collect();
    ensure!(!rules.is_empty(), "{TABLE} lists no rule");
    for room in ROOMS {
        visit(&workspace.root.join(room), &mut rules)?;
    }
    let lacking: Vec<String> = rules
        .iter()
        .filter(|(_, cited)| !cited.code || !cited.test)
        .map(|(rule, cited)| {
            let where_ = if cited.code {
                "a test"
            } else if cited.test {
                "code"
            } else {
                "code or test"
            };
            format!("{rule} is not cited in {where_}")
        })
        .collect();
    ensure!(lacking.is_empty(), "{}", lacking.join("; "));
    Ok(())
}

/// The first cell of each row that names a rule.
fn rules_of(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let cell = line.strip_prefix("| ")?.split(" | ").next()?.trim();
        (cell.starts_with("INV-") && !cell.contains(' ')).then_some(cell)
    })
}

fn visit(folder: &Path, rules: &mut BTreeMap<&str, Cited>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("listing {}", folder.display()))?.path();
        if path.is_dir() {
            visit(&path, rules)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let in_tests = path.components().any(|part| part.as_os_str() == "tests")
                || path.file_name().is_some_and(|name| name == "tests.rs");
            cite(&text, in_tests, rules);
        }
    }
    Ok(())
}

fn cite(text: &str, in_tests: bool, rules: &mut BTreeMap<&str, Cited>) {
    let (code, tests) =
        if in_tests { ("", text) } else { text.split_once("#[cfg(test)]").unwrap_or((text, "")) };
    for (rule, cited) in rules {
        cited.code |= mentions(code, rule);
        cited.test |= mentions(tests, rule);
    }
}

/// Whole ids only: INV-S1 is not INV-S10.
fn mentions(text: &str, rule: &str) -> bool {
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit());
    text.match_indices(rule).any(|(at, _)| text.get(at + rule.len()..).is_none_or(ends))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_whole_and_tests_are_told_from_code() {
        let mut rules = BTreeMap::from([("INV-S1", Cited::default()), ("INV-S10", Cited::default())]);
        cite("x \"INV-S10\" #[cfg(test)] mod tests { \"INV-S1\" }", false, &mut rules);
        assert!(rules["INV-S10"].code && !rules["INV-S10"].test);
        assert!(!rules["INV-S1"].code && rules["INV-S1"].test);
    }

    #[test]
    fn rows_name_rules() {
        let table = "| rule | says |\n|---|---|\n| INV-T1 | x |\n| INV-X of old | y |\ntext INV-T2\n";
        assert_eq!(rules_of(table).collect::<Vec<_>>(), ["INV-T1"]);
    }
}
