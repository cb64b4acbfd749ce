//! Stub
#![allow(missing_docs)]
use super::*;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Plain,
    Zlib,
    Zstd,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Legacy,
    Strict,
}
impl Style {
    pub fn of_machine(_: &str) -> Self {
        Self::Strict
    }
    pub fn markers(self) -> SyncMarkers {
        if self == Self::Strict { SyncMarkers::FlushWords } else { SyncMarkers::EveryPayload }
    }
}
#[derive(Debug, Clone)]
pub struct MultifdOptions {
    pub page_size_bytes: u32,
    pub channels: u8,
    pub method: Method,
    pub style: Style,
}
pub enum MultifdEvent<'a> {
    Init { id: u8, uuid: [u8; 16] },
    Page { block: usize, offset: u64 },
    PageBytes(&'a [u8]),
    ZeroPage { block: usize, offset: u64 },
    Sync,
}
pub trait MultifdSink {
    fn event(&mut self, at: u64, event: MultifdEvent<'_>) -> Result<(), Violation>;
}
#[derive(Debug)]
pub struct MultifdParser;
impl MultifdParser {
    pub fn new(_: MultifdOptions) -> Self {
        Self
    }
    pub fn feed(
        &mut self,
        input: &[u8],
        _blocks: Option<&Blocks>,
        _sink: &mut impl MultifdSink,
    ) -> Result<usize, Violation> {
        Ok(input.len())
    }
    pub fn validated(&self) -> u64 {
        0
    }
    pub fn pending(&self) -> &[u8] {
        &[]
    }
    pub fn at_packet_boundary(&self) -> bool {
        true
    }
    pub fn syncs(&self) -> u64 {
        0
    }
}
