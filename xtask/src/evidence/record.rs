//! The record of a whole run, and whether it is older than the code that it speaks of.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Outcome, machine};
use crate::run::{self, Workspace};

/// Below the workspace's root.
const FOLDER: &str = "evidence";

/// A record in the making.
pub(super) struct Record {
    name: String,
    document: Value,
}

impl Record {
    /// Notes what the run begins with: the code above all, which may change while it runs.
    pub(super) fn begin(
        workspace: &Workspace,
        name: &str,
        what: &str,
        paths: &[&str],
        seed: u64,
    ) -> Result<Self> {
        let commit = git(workspace, &["rev-parse", "HEAD"])?;
        let changes = git(workspace, &["status", "--porcelain", "--", ".", ":!evidence"])?;
        let date = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let document = json!({
            "name": name,
            "what": what,
            "seed": seed,
            "commit": commit.trim(),
            "clean": changes.trim().is_empty(),
            "date": date,
            "duration_s": 0,
            "machine": machine::describe(),
            "counts": Value::Null,
            "result": "failed",
            "paths": paths,
        });
        Ok(Self { name: name.to_owned(), document })
    }

    /// Adds what came out.
    pub(super) fn end(&mut self, outcome: &Outcome) {
        self.document["duration_s"] = outcome.took.as_secs().into();
        self.document["counts"] = outcome.counts.clone();
        self.document["result"] = outcome.word().into();
    }

    /// Writes it beside and renames, so that a broken attempt leaves the old record.
    pub(super) fn write(&self, workspace: &Workspace) -> Result<PathBuf> {
        let path = path(workspace, &self.name);
        let folder = path.parent().context("the record's path has no folder")?;
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let partial = path.with_extension("partial");
        let text = serde_json::to_string_pretty(&self.document).context("writing the record")? + "\n";
        fs::write(&partial, text).with_context(|| format!("writing {}", partial.display()))?;
        fs::rename(&partial, &path).with_context(|| format!("renaming to {}", path.display()))?;
        Ok(path)
    }
}

fn path(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.root.join(FOLDER).join(format!("{name}.json"))
}

/// Why a kind's record does not speak for the code as it is; nothing when it does.
pub(super) fn doubts(workspace: &Workspace, name: &str) -> Result<Vec<String>> {
    let Ok(text) = fs::read_to_string(path(workspace, name)) else {
        return Ok(vec![format!("no record (run `cargo xtask evidence {name}`)")]);
    };
    let record: Value =
        serde_json::from_str(&text).with_context(|| format!("reading the record of {name}"))?;
    let commit = record["commit"].as_str().with_context(|| format!("the record of {name} has no commit"))?;
    let paths = record["paths"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let paths: Vec<&str> = paths.collect();
    let mut doubts = Vec::new();
    if record["result"] != "passed" {
        doubts.push("it failed".to_owned());
    }
    if record["clean"] != true {
        doubts.push("it ran on a tree with changes that are in no commit".to_owned());
    }
    let range = format!("{commit}..HEAD");
    match git(workspace, &[&["log", "--oneline", &range, "--"][..], &paths].concat()) {
        Ok(log) if log.trim().is_empty() => {}
        Ok(log) => {
            doubts.push(format!("older than {} commits to the code it speaks of", log.lines().count()))
        }
        Err(_) => doubts.push(format!("its commit {commit} is not known here")),
    }
    let changes = git(workspace, &[&["status", "--porcelain", "--"][..], &paths].concat())?;
    if !changes.trim().is_empty() {
        doubts.push("the code it speaks of has changes that are in no commit".to_owned());
    }
    Ok(doubts)
}

fn git(workspace: &Workspace, arguments: &[&str]) -> Result<String> {
    run::quiet(workspace.command("git").args(arguments))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    /// A repository with one file that is spoken of and one that is not.
    fn repository() -> (tempfile::TempDir, Workspace) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let workspace = Workspace { target: root.join("target"), root };
        for arguments in
            [&["init", "--quiet"][..], &["config", "user.name", "t"], &["config", "user.email", "t@example"]]
        {
            git(&workspace, arguments).unwrap();
        }
        commit(&workspace, "code", "1");
        (folder, workspace)
    }

    fn commit(workspace: &Workspace, file: &str, text: &str) {
        fs::write(workspace.root.join(file), text).unwrap();
        git(workspace, &["add", file]).unwrap();
        git(workspace, &["commit", "--quiet", "--message", text]).unwrap();
    }

    #[test]
    fn a_record_is_doubted_once_its_code_has_changed() {
        let (_folder, workspace) = repository();
        let doubts = || doubts(&workspace, "n").unwrap().join("; ");
        assert!(doubts().contains("no record"));
        let mut record = Record::begin(&workspace, "n", "what", &["code"], 7).unwrap();
        let took = Duration::from_secs(3);
        record.end(&Outcome { passed: true, counts: json!({"streams": 1}), took });
        record.write(&workspace).unwrap();
        assert_eq!(record.document["clean"], true);
        assert_eq!(doubts(), "");
        commit(&workspace, "other", "x");
        assert_eq!(doubts(), "", "other files don't matter");
        fs::write(workspace.root.join("code"), "2").unwrap();
        assert!(doubts().contains("in no commit"));
        commit(&workspace, "code", "2");
        assert!(doubts().contains("older than 1 commits"), "{}", doubts());
    }

    #[test]
    fn a_failed_run_on_a_changed_tree_says_so() {
        let (_folder, workspace) = repository();
        fs::write(workspace.root.join("code"), "changed").unwrap();
        let mut record = Record::begin(&workspace, "n", "what", &["code"], 7).unwrap();
        record.end(&Outcome { passed: false, counts: Value::Null, took: Duration::ZERO });
        record.write(&workspace).unwrap();
        let doubts = doubts(&workspace, "n").unwrap().join("; ");
        assert!(doubts.contains("it failed") && doubts.contains("ran on a tree with changes"), "{doubts}");
    }
}
