//! The last cluster map on disk, so that a target serves while no MDS answers.
//!
//! `map.cache` in the target's directory: 24 bytes of header, then the map as a protobuf
//! `ashlar.v1.ClusterMap` (docs/format-target.md). Replaced whole. It is a cache: damage is
//! reported and costs a wait for the MDS, nothing else.

use crate::identity::replace_file;
use prost::Message;
use protocol::control::{Problem, ProblemKind, limits, map_from_pb, map_to_pb, pb};
use protocol::map::ClusterMap;
use std::io::{Error, ErrorKind};
use std::path::Path;

/// The file's name in a target's directory.
pub const FILE_NAME: &str = "map.cache";
const MAGIC: [u8; 8] = *b"ASHLRMAP";
const VERSION: u32 = 1;
/// magic 8, version 4, body length 4, CRC-32C of the body 4, CRC-32C of the 20 bytes before 4.
const HEADER_BYTES: usize = 24;

/// Replaces the cached map, durably.
pub(super) fn save(dir: &Path, map: &ClusterMap) -> Result<(), Problem> {
    let path = dir.join(FILE_NAME);
    replace_file(&path, &encode(map)).map_err(|error| failed(&path, "written", &error))
}

/// The cached map; `None` when there is none.
///
/// # Errors
/// When there is a file that cannot be read or is damaged.
pub(super) fn load(dir: &Path) -> Result<Option<ClusterMap>, Problem> {
    let path = dir.join(FILE_NAME);
    let bytes = match read_bounded(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(&path, "read", &error)),
    };
    decode(&bytes).map(Some).map_err(|why| {
        Problem::new(
            ProblemKind::Storage,
            format!("{} is damaged: {why}", path.display()),
            "the disk lost or changed it, or another version of ashlar wrote it",
            "nothing is lost: it is written anew once the MDS answers",
        )
    })
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, Error> {
    let length = std::fs::metadata(path)?.len();
    if length > (HEADER_BYTES + limits::MESSAGE_BYTES_MAX) as u64 {
        return Err(Error::new(ErrorKind::InvalidData, format!("{length} bytes are more than any map has")));
    }
    std::fs::read(path)
}

fn encode(map: &ClusterMap) -> Vec<u8> {
    let body = map_to_pb(map).encode_to_vec();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(crc32c::crc32c(&body).to_le_bytes());
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    assert_eq!(bytes.len(), HEADER_BYTES);
    bytes.extend(body);
    bytes
}

fn decode(bytes: &[u8]) -> Result<ClusterMap, String> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or("it is cut off")?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    if header[..8] != MAGIC {
        return Err("it is no map".into());
    }
    if word(20) != crc32c::crc32c(&header[..20]) {
        return Err("its header fails its checksum".into());
    }
    if word(8) != VERSION {
        return Err(format!("it has version {}, not {VERSION}", word(8)));
    }
    if word(12) as usize != body.len() {
        return Err("it is cut off, or too long".into());
    }
    if word(16) != crc32c::crc32c(body) {
        return Err("it fails its checksum".into());
    }
    let message = pb::ClusterMap::decode(body).map_err(|error| error.to_string())?;
    map_from_pb(&message).map_err(|problem| problem.what)
}

fn failed(path: &Path, verb: &str, error: &Error) -> Problem {
    Problem::new(
        ProblemKind::Storage,
        format!("{} cannot be {verb}", path.display()),
        error.to_string(),
        "check the directory's owner and free space; until then a restart must wait for the MDS",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::map::TargetEntry;
    use protocol::types::TargetId;

    fn map() -> ClusterMap {
        let mut map = ClusterMap { cluster: [9; 16], generation: 12, ..ClusterMap::default() };
        let peers = vec!["127.0.0.1:7501".parse().unwrap()];
        map.targets.insert(TargetId(1), TargetEntry { peers, nvme: None, draining: true });
        map
    }

    #[test]
    fn a_map_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()), Ok(None));
        save(dir.path(), &map()).unwrap();
        assert_eq!(load(dir.path()), Ok(Some(map())));
    }

    #[test]
    fn a_torn_file_is_reported_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let whole = encode(&map());
        for length in 0..whole.len() {
            std::fs::write(dir.path().join(FILE_NAME), &whole[..length]).unwrap();
            assert!(load(dir.path()).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let whole = encode(&map());
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_file_of_absurd_size_is_not_read_into_memory() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join(FILE_NAME)).unwrap();
        file.set_len(1 << 40).unwrap();
        assert!(load(dir.path()).is_err());
    }
}
