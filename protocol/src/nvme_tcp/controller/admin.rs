//! Commands of admin queues: properties, Identify, logs, events, Abort.

use super::{Answer, Controller, Controllers, Notice, Out, QueueId, View, namespace};
use crate::nvme_tcp::command::NSID;
use crate::nvme_tcp::identify::{self, AERL, IDENTIFY_BYTES, VERSION, cns};
use crate::nvme_tcp::logs::{self, Served};
use crate::nvme_tcp::wire::*;
use crate::types::{Time, VolumeId};
use std::collections::{BTreeMap, VecDeque};

/// Of CC: enabled.
const CC_EN: u32 = 1;
/// Of CC: every field that chooses among what is offered; all must be 0 but the sizes of entries.
const CC_CHOICES: u32 = 0x3ff0;
/// Of CSTS: ready, fatal, shutdown complete.
const CSTS_RDY: u32 = 1;
const CSTS_CFS: u32 = 2;
const CSTS_SHST_DONE: u32 = 2 << 2;

pub(super) type Result<T = Answer> = core::result::Result<T, Status>;

impl Controllers {
    /// A command of an admin queue, with the data that it had for us.
    pub fn admin(&mut self, queue: QueueId, sqe: &Sqe, data: &[u8], now: Time) -> Answer {
        let key = self.queues.get(&queue);
        let Some(controller) = key.and_then(|key| self.controllers.get_mut(key)) else {
            // Its connection is about to be closed.
            return Answer::Done { status: Status::SEQUENCE.dnr(), result: 0, data: Vec::new() };
        };
        controller.seen = now;
        let (view, served, ana_changes) = (&self.view, &self.served, self.ana_changes);
        let context = Context { view, served, ana_changes, out: &mut self.out };
        let answer = controller.command(sqe, data, context);
        answer.unwrap_or_else(|status| Answer::Done { status, result: 0, data: Vec::new() })
    }
}

/// What a controller sees of its surroundings.
pub(super) struct Context<'a> {
    pub view: &'a View,
    pub served: &'a BTreeMap<VolumeId, Served>,
    pub ana_changes: u64,
    pub out: &'a mut VecDeque<Out>,
}

impl Controller {
    fn command(&mut self, sqe: &Sqe, data: &[u8], context: Context<'_>) -> Result {
        if sqe.flags() & 3 != 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if sqe.opcode() == FABRICS {
            return match sqe.fctype() {
                fctype::PROPERTY_GET => self.property_get(sqe),
                fctype::PROPERTY_SET => self.property_set(sqe, context.out),
                _ => Err(Status::INVALID_OPCODE.dnr()),
            };
        }
        if !self.is_enabled() {
            return Err(Status::SEQUENCE.dnr());
        }
        match sqe.opcode() {
            admin::KEEP_ALIVE => Ok(Answer::ok(0)),
            admin::ASYNC_EVENT => self.async_event(sqe.cid(), context.out),
            admin::GET_LOG_PAGE => self.log_page(sqe, context),
            admin::IDENTIFY => self.identify(sqe, context.view),
            admin::SET_FEATURES => self.set_features(sqe, data, context.out),
            admin::GET_FEATURES => self.get_features(sqe),
            admin::ABORT => Ok(self.abort(sqe, context.out)),
            _ => Err(Status::INVALID_OPCODE.dnr()),
        }
    }

    fn capabilities() -> u64 {
        // Contiguous queues, ready within 15 s, the NVM command set.
        u64::from(QUEUE_ENTRIES_MAX - 1) | 1 << 16 | 30 << 24 | 1 << 37
    }
    fn property_get(&self, sqe: &Sqe) -> Result {
        let long = sqe.cdw(10) & 7;
        let value = match (sqe.cdw(11), long) {
            (property::CAP, 1) => Self::capabilities(),
            (property::VS, 0) => VERSION.into(),
            (property::CC, 0) => self.cc.into(),
            (property::CSTS, 0) => self.csts.into(),
            _ => return Err(Status::INVALID_FIELD.dnr()),
        };
        Ok(Answer::ok(value))
    }
    fn property_set(&mut self, sqe: &Sqe, out: &mut VecDeque<Out>) -> Result {
        if sqe.cdw(11) != property::CC || sqe.cdw(10) & 7 != 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        let (before, now) = (self.cc, sqe.cdw(12));
        self.cc = now;
        if now & CC_EN != 0 && before & CC_EN == 0 {
            self.enable();
        } else if now & CC_EN == 0 && before & CC_EN != 0 {
            self.reset(out);
        }
        let shutdown = now >> 14 & 3 != 0;
        self.csts = self.csts & !CSTS_SHST_DONE | if shutdown { CSTS_SHST_DONE } else { 0 };
        Ok(Answer::ok(0))
    }
    fn enable(&mut self) {
        let sizes = (self.cc >> 16 & 15, self.cc >> 20 & 15);
        // A discovery controller has no IO queues whose entries could have sizes.
        let fits = self.volume.is_none() || sizes == (6, 4);
        self.csts = if fits && self.cc & CC_CHOICES == 0 { CSTS_RDY } else { CSTS_CFS };
    }
    /// Ends IO queues and whatever waits.
    fn reset(&mut self, out: &mut VecDeque<Out>) {
        self.csts = 0;
        self.pending.clear();
        self.masked.clear();
        let (queue, status) = (self.admin, Status::ABORTED);
        out.extend(self.aers.drain(..).map(|cid| Out::Complete { queue, cid, status, result: 0 }));
        let why = "its controller was reset";
        out.extend(core::mem::take(&mut self.io).into_values().map(|queue| Out::Close { queue, why }));
    }

    fn async_event(&mut self, cid: u16, out: &mut VecDeque<Out>) -> Result {
        if self.aers.len() > usize::from(AERL) {
            return Err(Status::AER_LIMIT.dnr());
        }
        self.aers.push_back(cid);
        self.tell(out);
        Ok(Answer::Later)
    }
    /// Only what waits for events can be aborted; all else is soon over anyway.
    fn abort(&mut self, sqe: &Sqe, out: &mut VecDeque<Out>) -> Answer {
        let (qid, cid) = (sqe.cdw(10) as u16, (sqe.cdw(10) >> 16) as u16);
        let at = self.aers.iter().position(|aer| qid == 0 && *aer == cid);
        let Some(at) = at else { return Answer::ok(1) };
        self.aers.remove(at);
        out.push_back(Out::Complete { queue: self.admin, cid, status: Status::ABORTED, result: 0 });
        Answer::ok(0)
    }

    fn identify(&self, sqe: &Sqe, view: &View) -> Result {
        if (sqe.sgl().length as usize) < IDENTIFY_BYTES {
            return Err(Status::SGL_LENGTH.dnr());
        }
        let (kind, csi) = (sqe.cdw(10) as u8, sqe.cdw(11) >> 24);
        let cluster = &view.cluster;
        let Some(volume) = self.volume else {
            return match kind {
                cns::CONTROLLER => Ok(Answer::data(self.identity(view))),
                _ => Err(Status::INVALID_FIELD.dnr()),
            };
        };
        if matches!(kind, cns::CS_NAMESPACE | cns::CS_CONTROLLER | cns::CS_ACTIVE) && csi != 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        let found = namespace(view, volume);
        let inactive = vec![0; IDENTIFY_BYTES];
        let asked = match sqe.nsid() {
            NSID => Ok(found),
            _ => Err(Status::INVALID_NAMESPACE.dnr()),
        };
        let data = match kind {
            cns::CONTROLLER => self.identity(view),
            cns::NAMESPACE if sqe.nsid() == NSID_ALL => {
                // What namespaces have in common: the formats.
                found.map_or(inactive, |n| {
                    identify::namespace(cluster, &crate::nvme_tcp::Namespace { bytes: 0, ..n })
                })
            }
            cns::NAMESPACE => asked?.map_or(inactive, |n| identify::namespace(cluster, &n)),
            cns::DESCRIPTORS => match asked? {
                Some(_) => identify::descriptors(cluster, volume),
                None => return Err(Status::INVALID_NAMESPACE.dnr()),
            },
            // The command set adds nothing to a namespace without metadata.
            cns::CS_NAMESPACE => asked.map(|_| inactive)?,
            cns::ANY_NAMESPACE => asked?.map_or(inactive, |_| identify::any_namespace()),
            cns::CS_CONTROLLER => identify::nvm_controller(),
            cns::ACTIVE | cns::CS_ACTIVE if sqe.nsid() >= NSID_ALL - 1 => {
                return Err(Status::INVALID_NAMESPACE.dnr());
            }
            cns::ACTIVE | cns::CS_ACTIVE => identify::active(sqe.nsid(), found.is_some()),
            _ => return Err(Status::INVALID_FIELD.dnr()),
        };
        Ok(Answer::data(data))
    }
    fn identity(&self, view: &View) -> Vec<u8> {
        identify::controller(&identify::Controller {
            cntlid: self.cntlid,
            cluster: &view.cluster,
            nqn: &self.nqn,
            volume: self.volume,
        })
    }

    fn log_page(&mut self, sqe: &Sqe, context: Context<'_>) -> Result {
        let (page, lsp, retain) = (sqe.cdw(10) as u8, sqe.cdw(10) >> 8 & 0x7f, sqe.cdw(10) >> 15 & 1 != 0);
        let dwords = u64::from(sqe.cdw(10) >> 16) | u64::from(sqe.cdw(11) & 0xffff) << 16;
        let bytes = (dwords + 1) * 4;
        let offset = u64::from(sqe.cdw(12)) | u64::from(sqe.cdw(13)) << 32;
        if bytes > TRANSFER_BYTES_MAX.into() || !offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if u64::from(sqe.sgl().length) < bytes {
            return Err(Status::SGL_LENGTH.dnr());
        }
        let log = self.log(page, lsp, &context)?;
        if offset > log.len() as u64 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        if !retain {
            self.log_read(page, context.out);
        }
        let mut data = log[offset as usize..].to_vec();
        data.resize(bytes as usize, 0);
        Ok(Answer::data(data))
    }
    fn log(&self, page: u8, lsp: u32, context: &Context<'_>) -> Result<Vec<u8>> {
        let view = context.view;
        let Some(volume) = self.volume else {
            return match page {
                log::DISCOVERY => Ok(discovery_log(view, &self.host_nqn)),
                log::HOST_DISCOVERY => Ok(logs::hosts(view.generation, &self.host_nqn)),
                log::SUPPORTED => Ok(logs::supported(true)),
                _ => Err(Status::INVALID_LOG_PAGE.dnr()),
            };
        };
        Ok(match page {
            log::SUPPORTED => logs::supported(false),
            log::ERROR => logs::errors(),
            log::SMART => logs::smart(context.served.get(&volume).unwrap_or(&Served::default())),
            log::FIRMWARE => logs::firmware(),
            log::CHANGED_NS => logs::changed(self.changed),
            log::EFFECTS => logs::effects(),
            log::ANA => {
                let present = namespace(view, volume).is_some();
                logs::ana(view.ana, context.ana_changes, present, lsp & 1 != 0)
            }
            _ => return Err(Status::INVALID_LOG_PAGE.dnr()),
        })
    }
    /// Whoever has read a log wants to hear of the next change.
    fn log_read(&mut self, page: u8, out: &mut VecDeque<Out>) {
        for notice in [Notice::Namespace, Notice::Ana, Notice::Discovery] {
            if notice.page() == page {
                self.masked.remove(&notice);
            }
        }
        if page == log::CHANGED_NS {
            self.changed = false;
        }
        self.tell(out);
    }
}

fn discovery_log(view: &View, host: &str) -> Vec<u8> {
    let names: Vec<String> =
        view.shown(host).into_iter().map(|name| identify::nqn(&view.cluster, name)).collect();
    logs::discovery(view.generation, &names, &view.ports)
}
