//! Catalogues in the state folder: one file each, named by its key. A file that can't be used is made anew.

use super::{Key, Shape};
use crate::error::HostError;
use crate::folders::{private_folder, remove_file, write_durably};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use types::layout::MAX_CATALOGUE_BYTES;

/// Most that are kept; the oldest go first.
const FILES_MAX: usize = 256;
/// A catalogue, and the lists of devices and blocks beside it.
const FILE_BYTES_MAX: usize = MAX_CATALOGUE_BYTES + (1 << 20);

/// The folder.
#[derive(Debug)]
pub(super) struct Store(PathBuf);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    key: String,
    shape: Shape,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("it is longer than {FILE_BYTES_MAX} bytes")]
    TooLong,
    #[error("it cannot be understood: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("it is the catalogue of another key")]
    Foreign,
    #[error("its content is unusable: {0}")]
    Content(String),
}

impl Store {
    pub(super) const fn new(folder: PathBuf) -> Self {
        Self(folder)
    }

    fn path(&self, key: Key) -> PathBuf {
        self.0.join(format!("{key}.json"))
    }

    /// What is kept under a key, if it is good.
    pub(super) fn load(&self, key: Key) -> Option<Shape> {
        let path = self.path(key);
        match read(&path, key) {
            Ok(shape) => Some(shape),
            Err(Unusable::Read(error)) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a kept catalogue is made anew");
                remove_file(&path);
                None
            }
        }
    }

    /// Keeps a shape.
    pub(super) fn save(&self, key: Key, shape: &Shape) -> Result<(), HostError> {
        private_folder(&self.0)?;
        let path = self.path(key);
        let file = File { key: key.to_string(), shape: shape.clone() };
        let bytes = serde_json::to_vec(&file).map_err(|e| HostError::file("cannot encode", &path, e))?;
        write_durably(&path, &bytes)?;
        self.prune();
        Ok(())
    }

    fn prune(&self) {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let made = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified());
        let mut files: Vec<_> =
            entries.map(|e| (made(&e.path()).unwrap_or(SystemTime::UNIX_EPOCH), e.path())).collect();
        files.sort();
        let surplus = files.len().saturating_sub(FILES_MAX);
        files.iter().take(surplus).for_each(|(_, path)| remove_file(path));
    }
}

fn read(path: &Path, key: Key) -> Result<Shape, Unusable> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > FILE_BYTES_MAX {
        return Err(Unusable::TooLong);
    }
    let file: File = serde_json::from_slice(&bytes)?;
    if file.key != key.to_string() {
        return Err(Unusable::Foreign);
    }
    file.shape.catalogue.validate().map_err(|e| Unusable::Content(e.to_string()))?;
    if file.shape.devices.is_empty() || file.shape.ram_blocks.is_empty() {
        return Err(Unusable::Content("it has no devices".to_owned()));
    }
    Ok(file.shape)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use types::Digest;
    use types::inventory::{DeviceSection, RamBlock};

    fn key(number: u8) -> Key {
        Key(Digest([number; 32]))
    }

    fn shape(name: &str) -> Shape {
        Shape {
            catalogue: types::layout::Catalogue::default(),
            devices: vec![DeviceSection { name: name.to_owned(), instance: 0, version: 1 }],
            ram_blocks: vec![RamBlock { name: "pc.ram".to_owned(), length_bytes: 4096, content: None }],
        }
    }

    #[test]
    fn what_is_kept_comes_back_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("c"));
        assert_eq!(store.load(key(1)), None);
        store.save(key(1), &shape("one")).unwrap();
        store.save(key(2), &shape("two")).unwrap();
        assert_eq!(store.load(key(1)), Some(shape("one")));
        assert_eq!(store.load(key(2)), Some(shape("two")));
        let mode = std::fs::metadata(store.path(key(1))).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_or_foreign_file_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().to_owned());
        store.save(key(1), &shape("one")).unwrap();
        let whole = std::fs::read(store.path(key(1))).unwrap();
        let empty = Shape { devices: vec![], ..shape("one") };
        let empty = serde_json::to_vec(&File { key: key(1).to_string(), shape: empty }).unwrap();
        let foreign = serde_json::to_vec(&File { key: key(2).to_string(), shape: shape("two") }).unwrap();
        let later = String::from_utf8(whole.clone()).unwrap().replacen('{', "{\"format\":9,", 1);
        let long = [whole.clone(), vec![b' '; FILE_BYTES_MAX]].concat();
        for bad in
            [&whole[..whole.len() / 2], b"", b"\xff\xff", &empty, &foreign, later.as_bytes(), &long[..]]
        {
            std::fs::write(store.path(key(1)), bad).unwrap();
            assert_eq!(store.load(key(1)), None, "{}", String::from_utf8_lossy(&bad[..bad.len().min(90)]));
            assert!(!store.path(key(1)).exists());
        }
        std::fs::write(store.path(key(1)), &whole).unwrap();
        assert_eq!(store.load(key(1)), Some(shape("one")));
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().to_owned());
        for number in 0..FILES_MAX {
            let path = folder.path().join(format!("{number}.json"));
            let file = std::fs::File::create(&path).unwrap();
            let age = std::time::Duration::from_secs(1000 - number as u64);
            file.set_modified(SystemTime::now() - age).unwrap();
        }
        store.save(key(1), &shape("one")).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), FILES_MAX);
        assert!(!folder.path().join("0.json").exists() && folder.path().join("1.json").exists());
        assert!(store.load(key(1)).is_some());
    }
}
