//! Recorded channels: plain, gzip or xz, told apart by their first bytes.

use crate::error::InputError;
use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use xz2::bufread::XzDecoder;
use xz2::stream::{CONCATENATED, Stream};

/// What is read at a time.
const PIECE_BYTES: usize = 256 << 10;
/// xz's largest preset needs 65 MiB; a file that asks for more is not one of ours.
const XZ_MEMORY_BYTES: u64 = 128 << 20;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const XZ_MAGIC: [u8; 6] = *b"\xfd7zXZ\0";

/// An open recording.
pub(super) struct Recording {
    path: PathBuf,
    reader: Box<dyn Read>,
    buffer: Vec<u8>,
}

impl Recording {
    /// Opens it.
    pub(super) fn open(path: &Path) -> Result<Self, InputError> {
        let read = |source| InputError::Read { path: path.to_owned(), source };
        let mut file = BufReader::with_capacity(PIECE_BYTES, File::open(path).map_err(read)?);
        let head = file.fill_buf().map_err(read)?;
        let reader: Box<dyn Read> = if head.starts_with(&GZIP_MAGIC) {
            Box::new(MultiGzDecoder::new(file))
        } else if head.starts_with(&XZ_MAGIC) {
            let stream = Stream::new_stream_decoder(XZ_MEMORY_BYTES, CONCATENATED)
                .map_err(|error| read(std::io::Error::other(error)))?;
            Box::new(XzDecoder::new_stream(file, stream))
        } else {
            Box::new(file)
        };
        Ok(Self { path: path.to_owned(), reader, buffer: vec![0; PIECE_BYTES] })
    }

    /// The next piece; empty at the end.
    pub(super) fn piece(&mut self) -> Result<&[u8], InputError> {
        let count = loop {
            match self.reader.read(&mut self.buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(InputError::Read { path: self.path.clone(), source }),
                Ok(count) => break count,
            }
        };
        Ok(self.buffer.get(..count).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    fn whole(bytes: &[u8]) -> Result<Vec<u8>, InputError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut recording = Recording::open(file.path())?;
        let mut all = Vec::new();
        loop {
            let piece = recording.piece()?;
            if piece.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(piece);
        }
    }

    #[test]
    fn plain_gzip_and_xz_read_alike() {
        let content: Vec<u8> = (0..700_000u32).flat_map(|n| n.to_be_bytes()).collect();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&content).unwrap();
        let mut xz = xz2::write::XzEncoder::new(Vec::new(), 0);
        xz.write_all(&content).unwrap();
        for form in [content.clone(), gz.finish().unwrap(), xz.finish().unwrap()] {
            assert!(whole(&form).unwrap() == content);
        }
    }

    #[test]
    fn a_cut_archive_is_no_end_of_stream() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&[7; 100_000]).unwrap();
        let gz = gz.finish().unwrap();
        assert!(whole(&gz[..gz.len() - 20]).is_err());
        assert!(whole(b"").unwrap().is_empty());
    }
}
