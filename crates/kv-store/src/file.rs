//! One block's file: a fixed header, token ids, the engine's bytes, and a checksum over all of them.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `cortexkv` |
//! | 4 | version of this layout |
//! | 32 | exact fingerprint |
//! | 32 | address |
//! | 1 + 32 | whether it has a parent, and its address |
//! | 32 | salt |
//! | 4 | depth |
//! | 4 | number of token ids |
//! | 8 | number of the engine's bytes |
//! | 4 each | token ids |
//! | | the engine's bytes |
//! | 32 | BLAKE3 of everything before |
//!
//! Numbers are little-endian.

use inference::PrefixHash;
use words::Fingerprint;

use crate::KvBlock;

/// The version that this program writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"cortexkv";
/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = 8 + 4 + 32 + 32 + 33 + 32 + 4 + 4 + 8;
/// Most token ids of a block.
const TOKENS_MAX: usize = 1 << 16;
/// Most bytes of a block's content.
const BYTES_MAX: u64 = 1 << 30;

/// Why a file is no block that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Somebody else's.
    #[error("it is no stored block")]
    Foreign,
    /// Of another version of the layout.
    #[error("it has version {0} of the layout, this program reads {FORMAT_VERSION}")]
    Version(u32),
    /// Shorter or longer than it says.
    #[error("it is cut off, or longer than it says")]
    Length,
    /// What it holds is not what was written.
    #[error("its checksum does not fit")]
    Checksum,
    /// It was computed by another engine, or from other tokens, than its place says.
    #[error("it is of another model or prefix than its name says")]
    Address,
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) of: Fingerprint,
    pub(crate) hash: PrefixHash,
    pub(crate) parent: Option<PrefixHash>,
    pub(crate) salt: [u8; 32],
    pub(crate) depth: u32,
    pub(crate) tokens: usize,
    pub(crate) bytes: u64,
}

impl Header {
    /// Returns the length of the whole file.
    pub(crate) fn file_bytes(&self) -> u64 {
        (HEADER_BYTES + 4 * self.tokens + 32) as u64 + self.bytes
    }
}

/// Writes a block as a file's content.
pub(crate) fn encode(of: &Fingerprint, hash: &PrefixHash, block: &KvBlock) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + 4 * block.tokens.len() + block.bytes.len() + 32);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    out.extend_from_slice(&of.0);
    out.extend_from_slice(hash);
    out.push(u8::from(block.parent.is_some()));
    out.extend_from_slice(&block.parent.unwrap_or_default());
    out.extend_from_slice(&block.salt);
    out.extend_from_slice(&block.depth.to_le_bytes());
    out.extend_from_slice(&(block.tokens.len() as u32).to_le_bytes());
    out.extend_from_slice(&(block.bytes.len() as u64).to_le_bytes());
    block.tokens.iter().for_each(|token| out.extend_from_slice(&token.to_le_bytes()));
    out.extend_from_slice(&block.bytes);
    let checksum = blake3::hash(&out);
    out.extend_from_slice(checksum.as_bytes());
    out
}

/// Takes fixed-size pieces off a slice whose length was checked.
struct Pieces<'a>(&'a [u8]);

impl Pieces<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FileError> {
        let (piece, rest) = self.0.split_first_chunk::<N>().ok_or(FileError::Length)?;
        self.0 = rest;
        Ok(*piece)
    }

    fn number(&mut self) -> Result<u32, FileError> {
        self.take().map(u32::from_le_bytes)
    }
}

/// Reads a header alone.
///
/// # Errors
/// [`FileError`], but neither `Checksum` nor `Address`.
pub(crate) fn header(bytes: &[u8]) -> Result<Header, FileError> {
    let mut pieces = Pieces(bytes);
    if pieces.take::<8>().map_err(|_| FileError::Foreign)? != *MAGIC {
        return Err(FileError::Foreign);
    }
    let version = pieces.number()?;
    if version != FORMAT_VERSION {
        return Err(FileError::Version(version));
    }
    let (of, hash) = (Fingerprint(pieces.take()?), pieces.take()?);
    let has_parent = pieces.take::<1>()?[0];
    let parent = pieces.take::<32>()?;
    let (salt, depth) = (pieces.take()?, pieces.number()?);
    let (tokens, bytes) = (pieces.number()? as usize, u64::from_le_bytes(pieces.take()?));
    if has_parent > 1 || tokens > TOKENS_MAX || bytes > BYTES_MAX {
        return Err(FileError::Length);
    }
    Ok(Header { of, hash, parent: (has_parent == 1).then_some(parent), salt, depth, tokens, bytes })
}

/// Reads a block, and believes nothing of it that can be checked.
///
/// # Errors
/// [`FileError`].
pub(crate) fn decode(of: &Fingerprint, hash: &PrefixHash, file: &[u8]) -> Result<KvBlock, FileError> {
    let header = header(file)?;
    if header.file_bytes() != file.len() as u64 {
        return Err(FileError::Length);
    }
    let (content, checksum) = file.split_at(file.len() - 32);
    if blake3::hash(content).as_bytes() != checksum {
        return Err(FileError::Checksum);
    }
    let (tokens, bytes) = content[HEADER_BYTES..].split_at(4 * header.tokens);
    let mut pieces = Pieces(tokens);
    let tokens = (0..header.tokens).map(|_| pieces.number()).collect::<Result<_, _>>()?;
    let Header { parent, salt, depth, .. } = header;
    let block = KvBlock { parent, salt, tokens, depth, bytes: bytes.to_vec() };
    if header.of != *of || header.hash != *hash || block.hash() != *hash {
        return Err(FileError::Address);
    }
    Ok(block)
}
