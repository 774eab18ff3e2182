//! Set Features and Get Features. Nothing is saved: every association begins with the defaults.

use super::admin::Result;
use super::{Answer, Controller, Out};
use crate::nvme_tcp::identify::{OAES, OAES_DISCOVERY};
use crate::nvme_tcp::wire::*;
use std::collections::VecDeque;

/// Bytes of Host Behavior Support.
const BEHAVIOR_BYTES: usize = 512;
/// Critical warnings, which never come.
const WARNINGS: u32 = 0xff;

impl Controller {
    fn is_known(&self, id: u8) -> bool {
        use feature::*;
        match id {
            ASYNC_EVENT | KEEP_ALIVE => true,
            ARBITRATION | POWER | TEMPERATURE | ERROR_RECOVERY | QUEUES | ATOMICITY | HOST_BEHAVIOR
            | HOST_ID => self.volume.is_some(),
            // WRITE_CACHE: there is none, and hosts that ask are told so.
            _ => false,
        }
    }
    pub(super) fn set_features(&mut self, sqe: &Sqe, data: &[u8], out: &mut VecDeque<Out>) -> Result {
        let (id, value) = (sqe.cdw(10) as u8, sqe.cdw(11));
        if !self.is_known(id) {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if sqe.cdw(10) >> 31 != 0 {
            return Err(Status::NOT_SAVEABLE.dnr());
        }
        match id {
            feature::QUEUES => return self.set_queues(value),
            feature::ASYNC_EVENT => {
                let known = if self.volume.is_some() { OAES | WARNINGS } else { OAES_DISCOVERY };
                self.event_bits = value & known;
                self.pending.retain(|notice| value & notice.bit() != 0);
                self.tell(out);
            }
            feature::KEEP_ALIVE => self.kato_ms = value,
            feature::HOST_ID => return Err(Status::SEQUENCE.dnr()),
            feature::HOST_BEHAVIOR if data.len() != BEHAVIOR_BYTES => {
                return Err(Status::SGL_LENGTH.dnr());
            }
            feature::HOST_BEHAVIOR => self.behavior = data.to_vec(),
            feature::POWER if value & 0x1f != 0 => return Err(Status::INVALID_FIELD.dnr()),
            _ => {
                self.features.insert(id, value);
            }
        }
        Ok(Answer::ok(0))
    }
    fn set_queues(&mut self, value: u32) -> Result {
        let (submission, completion) = (value & 0xffff, value >> 16);
        if submission == 0xffff || completion == 0xffff {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if !self.io.is_empty() {
            return Err(Status::SEQUENCE.dnr());
        }
        let wanted = submission.min(completion) + 1;
        self.io_max = wanted.min(IO_QUEUES_MAX.into()) as u16;
        Ok(Answer::ok(self.queues()))
    }
    fn queues(&self) -> u64 {
        let less_one = u64::from(self.io_max - 1);
        less_one | less_one << 16
    }
    pub(super) fn get_features(&self, sqe: &Sqe) -> Result {
        let (id, select) = (sqe.cdw(10) as u8, sqe.cdw(10) >> 8 & 7);
        if !self.is_known(id) || select != 0 {
            // Saved and default values are not told (ONCS says so).
            return Err(Status::INVALID_FIELD.dnr());
        }
        let room = sqe.sgl().length as usize;
        let with_data = |data: Vec<u8>| match room < data.len() {
            true => Err(Status::SGL_LENGTH.dnr()),
            false => Ok(Answer::data(data)),
        };
        match id {
            feature::QUEUES => Ok(Answer::ok(self.queues())),
            feature::ASYNC_EVENT => Ok(Answer::ok(self.event_bits.into())),
            feature::KEEP_ALIVE => Ok(Answer::ok(self.kato_ms.into())),
            // Fabrics know the long form only.
            feature::HOST_ID if sqe.cdw(11) & 1 == 0 => Err(Status::INVALID_FIELD.dnr()),
            feature::HOST_ID => with_data(self.host_id.to_vec()),
            feature::HOST_BEHAVIOR => {
                let mut data = self.behavior.clone();
                data.resize(BEHAVIOR_BYTES, 0);
                with_data(data)
            }
            // The upper threshold that Identify names; the lower one is 0.
            feature::TEMPERATURE => {
                let default = if sqe.cdw(11) >> 20 & 3 == 0 { 363 } else { 0 };
                Ok(Answer::ok(self.features.get(&id).map_or(default, |value| (value & 0xffff).into())))
            }
            _ => Ok(Answer::ok(self.features.get(&id).copied().unwrap_or(0).into())),
        }
    }
}
