//! Configuration files: TOML, strict, with the line of every mistake.
//!
//! Order of precedence: flag, environment, file, built-in default.

use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// No honest configuration or spec is longer.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 20;

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// Not readable.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Longer than any honest file.
    #[error("the configuration file {} is larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Syntax, unknown key or bad value.
    #[error("{place}: {reason}")]
    Malformed {
        /// `file:line`.
        place: String,
        /// What is wrong, with the key.
        reason: String,
        /// Which example file documents the keys.
        example: &'static str,
    },
    /// A flag or an environment variable has a bad value.
    #[error("{setting} {value:?} cannot be used: {reason}")]
    Setting {
        /// The flag.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: String,
    },
}

impl ConfigError {
    /// What to do about it, where more can be said.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Malformed { example, .. } => Some(format!("packaging/{example} documents every key")),
            Self::Read { .. } | Self::TooLarge { .. } | Self::Setting { .. } => None,
        }
    }
}

/// The settings in a daemon's file as a table that flags may still change. Without `explicit`, `default_path` is
/// read when it exists.
pub(crate) fn load_table(
    explicit: Option<&Path>,
    default_path: &Path,
    example: &'static str,
) -> Result<Loaded, ConfigError> {
    let path = match explicit {
        Some(path) => path,
        None if default_path.exists() => default_path,
        None => {
            return Ok(Loaded { path: None, text: String::new(), table: toml::Table::new(), example });
        }
    };
    let text = read_bounded(path)?;
    let table = text.parse::<toml::Table>().map_err(|error| malformed(path, &text, &error, example))?;
    Ok(Loaded { path: Some(path.to_owned()), text, table, example })
}

fn read_bounded(path: &Path) -> Result<String, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).map_err(read)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

/// A file that was read, with what flags put over it.
#[derive(Debug)]
pub(crate) struct Loaded {
    path: Option<PathBuf>,
    text: String,
    table: toml::Table,
    example: &'static str,
}

impl Loaded {
    /// Whether there was a file.
    pub(crate) fn is_read(&self) -> bool {
        self.path.is_some()
    }

    /// Puts a flag over the file's value.
    pub(crate) fn set(&mut self, key: &str, value: Option<impl Into<toml::Value>>) {
        if let Some(value) = value {
            self.table.insert(key.to_owned(), value.into());
        }
    }

    /// The daemon's own configuration type.
    pub(crate) fn parse<T: DeserializeOwned>(self) -> Result<T, ConfigError> {
        let merged = match toml::Value::Table(self.table).try_into::<T>() {
            Ok(config) => return Ok(config),
            Err(error) => error,
        };
        // The merged table has no lines: the same mistake is looked for in the file, which has them.
        match (self.path, toml::from_str::<T>(&self.text).err()) {
            (Some(path), Some(error)) => Err(malformed(&path, &self.text, &error, self.example)),
            // The file is good, or there is none: it is a flag, or a key that nobody gave.
            (_, _) => Err(ConfigError::Malformed {
                place: "settings".to_owned(),
                reason: one_line(&merged.to_string()),
                example: self.example,
            }),
        }
    }
}

fn malformed(path: &Path, text: &str, error: &toml::de::Error, example: &'static str) -> ConfigError {
    let (place, reason) = explain(&path.display().to_string(), text, error);
    ConfigError::Malformed { place, reason, example }
}

/// Where (`file:line`, or `file` for a missing key) and what is wrong, with the line itself, since the message
/// alone may not name the key.
pub(crate) fn explain(file: &str, text: &str, error: &toml::de::Error) -> (String, String) {
    let reason = one_line(error.message());
    let Some(span) = error.span().filter(|span| span.start > 0 || span.end < text.len()) else {
        return (file.to_owned(), reason);
    };
    let before = text.get(..span.start).unwrap_or(text);
    let number = 1 + before.matches('\n').count();
    let line: String = text.lines().nth(number - 1).unwrap_or_default().trim().chars().take(80).collect();
    let reason = if line.is_empty() { reason } else { format!("{reason}, in: {line}") };
    (format!("{file}:{number}"), reason)
}

fn one_line(text: &str) -> String {
    text.trim().replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        port: u16,
        #[serde(default)]
        name: String,
    }

    fn check(text: &str, flag: Option<i64>) -> Result<Sample, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let mut loaded = load_table(Some(file.path()), Path::new("/nonexistent"), "sample.toml")
            .map_err(|e| e.to_string().replace(&file.path().display().to_string(), "F"))?;
        loaded.set("port", flag);
        loaded.parse().map_err(|e| e.to_string().replace(&file.path().display().to_string(), "F"))
    }

    #[test]
    fn flags_win_over_the_file() {
        assert_eq!(check("port = 1\nname = 'a'\n", Some(2)).unwrap().port, 2);
        let sample = check("port = 1\nname = 'a'\n", None).unwrap();
        assert_eq!((sample.port, sample.name.as_str()), (1, "a"));
    }

    #[test]
    fn mistakes_are_named_with_key_and_line() {
        let unknown = check("port = 1\n\nprot = 2\n", None).unwrap_err();
        assert!(unknown.starts_with("F:3: unknown field `prot`"), "{unknown}");
        let type_error = check("name = 'x'\nport = 'eighty'\n", None).unwrap_err();
        assert!(type_error.starts_with("F:2: invalid type"), "{type_error}");
        assert!(type_error.ends_with(", in: port = 'eighty'"), "{type_error}");
        let syntax = check("port = 1\nname = \n", None).unwrap_err();
        assert!(syntax.starts_with("F:2: "), "{syntax}");
        let missing = check("name = 'x'\n", None).unwrap_err();
        assert!(missing.contains("missing field `port`"), "{missing}");
    }

    #[test]
    fn a_file_that_was_named_must_exist_and_be_small() {
        let missing = load_table(Some(Path::new("/nonexistent/x.toml")), Path::new("/nonexistent"), "s");
        assert!(matches!(missing, Err(ConfigError::Read { .. })));
        let huge = "#".repeat(usize::try_from(MAX_FILE_BYTES).unwrap() + 1);
        assert!(check(&huge, None).unwrap_err().contains("larger than"));
        assert!(load_table(None, Path::new("/nonexistent"), "s").is_ok());
    }
}
