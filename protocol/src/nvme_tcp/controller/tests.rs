//! Connect, properties, Identify, logs, features and events, through the calls that a target makes.

use super::*;
use crate::nvme_tcp::command::{IoCommand, NSID};
use crate::nvme_tcp::host::{CC_ENABLE, connect_data};
use crate::nvme_tcp::wire::{admin, log};
use std::collections::BTreeSet;

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:host";
const CLUSTER: [u8; 16] = [0xab; 16];

fn volume(id: u32, name: &str, bytes: u64) -> Volume {
    Volume {
        name: name.into(),
        namespace: Namespace { volume: VolumeId(id), bytes, block_bytes: 4096 },
        allowed_hosts: BTreeSet::new(),
        session: Session::default(),
    }
}

fn view() -> View {
    View {
        cluster: CLUSTER,
        generation: 4,
        target: 2,
        ports: vec![(1, "127.0.0.1:4420".parse().unwrap()), (2, "[::1]:4421".parse().unwrap())],
        volumes: vec![volume(1, "vol0", 1 << 30), volume(2, "vol1", 1 << 20)],
        ana: Ana::Optimized,
    }
}

fn vol0() -> String {
    identify::nqn(&CLUSTER, "vol0")
}

fn new() -> Controllers {
    let mut controllers = Controllers::new();
    controllers.set_view(view());
    controllers
}

fn connect(
    c: &mut Controllers,
    queue: QueueId,
    qid: u16,
    cntlid: u16,
    nqn: &str,
) -> Result<Connected, Refused> {
    let sqe = Sqe::connect(0, qid, 32, 5_000);
    c.connect(queue, &sqe, &connect_data([1; 16], cntlid, nqn, HOST), Time(0))
}

/// Queue 0 is the admin queue of an enabled controller.
fn enabled(nqn: &str) -> (Controllers, u16) {
    let mut c = new();
    let cntlid = connect(&mut c, 0, 0, u16::MAX, nqn).expect("accepted").cntlid;
    assert_eq!(ask(&mut c, Sqe::property_set(1, property::CC, CC_ENABLE)).0, Status::SUCCESS);
    assert_eq!(ask(&mut c, Sqe::property_get(1, property::CSTS, false)).1, 1);
    (c, cntlid)
}

fn ask(c: &mut Controllers, sqe: Sqe) -> (Status, u64, Vec<u8>) {
    match c.admin(0, &sqe, &[], Time(1)) {
        Answer::Done { status, result, data } => (status, result, data),
        Answer::Later => panic!("{sqe:?} waits"),
    }
}

fn told(c: &mut Controllers) -> Vec<Out> {
    core::iter::from_fn(|| c.poll()).collect()
}

fn get_log(page: u8, bytes: u32, offset: u64) -> Sqe {
    let sqe = Sqe::new(admin::GET_LOG_PAGE, 1, 0).with_data(bytes, false);
    sqe.with(10, (bytes / 4 - 1) << 16 | u32::from(page)).with(12, offset as u32)
}

fn identify(cns: u8, nsid: u32) -> Sqe {
    Sqe::new(admin::IDENTIFY, 1, nsid).with_data(4096, false).with(10, cns.into())
}

fn set(feature: u8, value: u32) -> Sqe {
    Sqe::new(admin::SET_FEATURES, 1, 0).with(10, feature.into()).with(11, value)
}

#[test]
fn a_connect_that_makes_no_sense_is_told_which_parameter() {
    let mut c = new();
    let data = |at: usize, value: &[u8]| {
        let mut data = connect_data([1; 16], u16::MAX, &vol0(), HOST);
        put(&mut data, at, value);
        data
    };
    let sqe = Sqe::connect(0, 0, 32, 0);
    let mut recfmt = sqe;
    recfmt.0[40] = 1;
    let plain = data(0, &[]);
    let parameter = |result: u32| (Status::CONNECT_PARAMETER.dnr(), result);
    let in_data = |offset: u32| parameter(1 << 16 | offset);
    let cases = [
        (recfmt, plain.clone(), (Status::CONNECT_FORMAT.dnr(), 0)),
        (Sqe::connect(0, 0, 1, 0), plain.clone(), parameter(44)),
        (Sqe::connect(0, 0, 257, 0), plain.clone(), parameter(44)),
        (Sqe::connect(0, 0, 0, 0), plain.clone(), parameter(44)),
        (sqe, data(16, &[1, 0]), in_data(16)),
        (sqe, data(256, b"nqn.x"), in_data(256)),
        (sqe, data(256, &[0; 256]), in_data(256)),
        (sqe, data(256, &[b'a'; 256]), in_data(256)),
        (sqe, data(512, &[0; 256]), in_data(512)),
        (sqe, data(512, &[b'a'; 256]), in_data(512)),
        (sqe, data(512, &[0xff, 0]), in_data(512)),
        (Sqe::connect(0, 1, 32, 0), plain.clone(), in_data(16)),
        (Sqe::connect(0, 1, 32, 0), data(16, &[9, 9]), in_data(16)),
    ];
    for (at, (sqe, data, refused)) in cases.into_iter().enumerate() {
        assert_eq!(c.connect(0, &sqe, &data, Time(0)), Err(refused), "case {at}");
    }
    assert!(c.queues.is_empty() && c.controllers.is_empty());
}

#[test]
fn an_io_queue_needs_its_own_hosts_enabled_controller_and_a_free_number() {
    let mut c = new();
    let id = connect(&mut c, 0, 0, u16::MAX, &vol0()).expect("accepted").cntlid;
    let io = |c: &mut Controllers, queue, qid| connect(c, queue, qid, id, &vol0());
    assert_eq!(io(&mut c, 1, 1), Err((Status::SEQUENCE.dnr(), 0)), "not enabled");
    ask(&mut c, Sqe::property_set(1, property::CC, CC_ENABLE));
    assert_eq!(ask(&mut c, set(feature::QUEUES, 1 << 16 | 1)).1, 1 << 16 | 1);
    let accepted = io(&mut c, 1, 1).expect("accepted");
    assert_eq!(accepted.namespace.map(|n| n.volume), Some(VolumeId(1)));
    assert_eq!(io(&mut c, 2, 1), Err((Status::SEQUENCE.dnr(), 0)), "twice");
    for qid in [3, u16::MAX] {
        assert_eq!(io(&mut c, 2, qid), Err((Status::CONNECT_PARAMETER.dnr(), 42)), "queue {qid} of 2");
    }
    let other = connect_data([1; 16], id, &vol0(), "nqn.other");
    let sqe = Sqe::connect(0, 2, 32, 0);
    assert_eq!(c.connect(2, &sqe, &other, Time(0)), Err((Status::CONNECT_PARAMETER.dnr(), 1 << 16 | 512)));
    let other = connect_data([2; 16], id, &vol0(), HOST);
    assert_eq!(c.connect(2, &sqe, &other, Time(0)), Err((Status::CONNECT_PARAMETER.dnr(), 1 << 16)));
    assert_eq!(ask(&mut c, set(feature::QUEUES, 0)).0, Status::SEQUENCE.dnr(), "queues exist");
    c.closed(1);
    assert!(io(&mut c, 1, 1).is_ok(), "free again");
}

#[test]
fn the_end_of_an_admin_queue_ends_its_io_queues_and_nobody_elses() {
    let (mut c, id) = enabled(&vol0());
    connect(&mut c, 1, 1, id, &vol0()).expect("accepted");
    let second = connect(&mut c, 5, 0, u16::MAX, &vol0()).expect("accepted").cntlid;
    assert_ne!(second, id);
    c.closed(0);
    assert_eq!(told(&mut c), [Out::Close { queue: 1, why: "its admin queue is gone" }]);
    c.closed(1);
    assert!(told(&mut c).is_empty());
    assert_eq!(c.controllers.len(), 1);
}

#[test]
fn targets_give_out_different_ids() {
    let mut ids = BTreeSet::new();
    for target in [1, 2, 3, 200] {
        let mut c = Controllers::new();
        c.set_view(View { target, ..view() });
        for queue in 0..255 {
            let id = connect(&mut c, queue, 0, u16::MAX, &vol0()).expect("accepted").cntlid;
            assert!((1..0xfff0).contains(&id) && ids.insert(id), "{id}");
        }
        assert_eq!(connect(&mut c, 999, 0, u16::MAX, &vol0()), Err((Status::CONNECT_BUSY, 0)));
    }
}

#[test]
fn properties_are_as_wide_as_they_are_and_nothing_works_before_enabling() {
    let mut c = new();
    connect(&mut c, 0, 0, u16::MAX, &vol0()).expect("accepted");
    assert_eq!(ask(&mut c, identify(1, 0)).0, Status::SEQUENCE.dnr());
    let cap = ask(&mut c, Sqe::property_get(1, property::CAP, true)).1;
    assert_eq!(cap & 0xffff, 255);
    for (offset, long) in [(property::CAP, false), (property::VS, true), (0x28, false), (u32::MAX, true)] {
        assert_eq!(ask(&mut c, Sqe::property_get(1, offset, long)).0, Status::INVALID_FIELD.dnr());
    }
    for offset in [property::CAP, property::CSTS, 0x28] {
        assert_eq!(ask(&mut c, Sqe::property_set(1, offset, 1)).0, Status::INVALID_FIELD.dnr());
    }
    ask(&mut c, Sqe::property_set(1, property::CC, 1));
    assert_eq!(ask(&mut c, Sqe::property_get(1, property::CSTS, false)).1, 2, "entries of size 1 are fatal");
    ask(&mut c, Sqe::property_set(1, property::CC, 0));
    ask(&mut c, Sqe::property_set(1, property::CC, CC_ENABLE));
    assert_eq!(ask(&mut c, identify(1, 0)).0, Status::SUCCESS);
    ask(&mut c, Sqe::property_set(1, property::CC, CC_ENABLE | 1 << 14));
    assert_eq!(ask(&mut c, Sqe::property_get(1, property::CSTS, false)).1, 1 | 2 << 2, "shutdown complete");
}

#[test]
fn a_reset_ends_io_queues_and_answers_what_waits() {
    let (mut c, id) = enabled(&vol0());
    connect(&mut c, 1, 1, id, &vol0()).expect("accepted");
    assert_eq!(c.admin(0, &Sqe::new(admin::ASYNC_EVENT, 8, 0), &[], Time(1)), Answer::Later);
    ask(&mut c, Sqe::property_set(1, property::CC, CC_ENABLE & !1));
    let aborted = Out::Complete { queue: 0, cid: 8, status: Status::ABORTED, result: 0 };
    assert_eq!(told(&mut c), [aborted, Out::Close { queue: 1, why: "its controller was reset" }]);
}

#[test]
fn a_silent_host_is_let_go_and_one_that_speaks_is_kept() {
    let (mut c, id) = enabled(&vol0());
    connect(&mut c, 1, 1, id, &vol0()).expect("accepted");
    let at = |ms| Time(1) + Span::ms(ms);
    c.tick(at(5_900));
    assert!(told(&mut c).is_empty());
    c.admin(0, &Sqe::new(admin::KEEP_ALIVE, 1, 0), &[], at(5_900));
    c.tick(at(11_000));
    assert!(told(&mut c).is_empty());
    c.tick(at(11_901));
    let queue = |out| match out {
        Out::Close { queue, .. } => Some(queue),
        _ => None,
    };
    let queues: Vec<QueueId> = told(&mut c).into_iter().filter_map(queue).collect();
    assert_eq!(queues, [0, 1]);
    assert!(c.is_empty());
}

#[test]
fn a_host_that_wants_no_timer_has_none_but_in_discovery() {
    let mut c = new();
    for (queue, nqn) in [(0, DISCOVERY_NQN.to_owned()), (1, vol0())] {
        let data = connect_data([1; 16], u16::MAX, &nqn, HOST);
        c.connect(queue, &Sqe::connect(0, 0, 32, 0), &data, Time(0)).expect("accepted");
    }
    c.tick(Time(0) + DISCOVERY_IDLE);
    assert!(told(&mut c).is_empty());
    c.tick(Time(0) + DISCOVERY_IDLE + GRACE);
    let why = "keep alive timer expired";
    assert_eq!(told(&mut c), [Out::Close { queue: 0, why }], "discovery alone");
    c.tick(Time(0) + Span::ms(1 << 40));
    assert!(told(&mut c).is_empty(), "for ever");
}

#[test]
fn a_host_may_have_several_controllers_of_a_subsystem_and_each_its_own_queues() {
    let (mut c, first) = enabled(&vol0());
    let second = connect(&mut c, 1, 0, u16::MAX, &vol0()).expect("the same host once more").cntlid;
    assert_ne!(first, second);
    c.admin(1, &Sqe::property_set(1, property::CC, CC_ENABLE), &[], Time(1));
    for (queue, id) in [(2, first), (3, second)] {
        connect(&mut c, queue, 1, id, &vol0()).expect("queue 1 of each");
    }
    c.closed(1);
    assert!(matches!(told(&mut c)[..], [Out::Close { queue: 3, .. }]), "the other one stays");
    // Its id belongs to nobody now, or to whoever comes next.
    assert_eq!(connect(&mut c, 4, 2, second, &vol0()).map_err(|e| e.1), Err(1 << 16 | 16));
}

#[test]
fn identify_answers_what_linux_asks_and_refuses_the_rest() {
    let (mut c, id) = enabled(&vol0());
    let controller = ask(&mut c, identify(identify::cns::CONTROLLER, 0)).2;
    assert_eq!(u16_at(&controller, 78), id);
    assert_eq!((controller[77], controller[111], controller[525]), (8, 1, 6));
    assert_eq!(u32_at(&controller, 1792), (64 + (16 << 10)) / 16);
    assert_eq!(&controller[768..768 + vol0().len()], vol0().as_bytes());
    let namespace = ask(&mut c, identify(identify::cns::NAMESPACE, NSID)).2;
    assert_eq!((u64_at(&namespace, 0), namespace[130]), ((1 << 30) / 4096, 12));
    let descriptors = ask(&mut c, identify(identify::cns::DESCRIPTORS, NSID)).2;
    assert_eq!(&descriptors[..4], [1, 8, 0, 0]);
    assert_eq!(descriptors[16..32], namespace[104..120], "the same NGUID in both");
    let active = ask(&mut c, identify(identify::cns::ACTIVE, 0)).2;
    assert_eq!((u32_at(&active, 0), u32_at(&active, 4)), (1, 0));
    assert_eq!(ask(&mut c, identify(identify::cns::ACTIVE, 1)).2, vec![0; 4096]);
    for kind in [5, 6, 7, 8] {
        let nsid = if kind == 7 { 0 } else { NSID };
        assert_eq!(ask(&mut c, identify(kind, nsid)).0, Status::SUCCESS, "CNS {kind}");
        let zoned = identify(kind, nsid).with(11, 2 << 24);
        let expected = if kind == 8 { Status::SUCCESS } else { Status::INVALID_FIELD.dnr() };
        assert_eq!(ask(&mut c, zoned).0, expected, "CNS {kind} of another command set");
    }
    for nsid in [0, 2] {
        assert_eq!(ask(&mut c, identify(0, nsid)).0, Status::INVALID_NAMESPACE.dnr());
    }
    assert_eq!(ask(&mut c, identify(0x55, 0)).0, Status::INVALID_FIELD.dnr());
    assert_eq!(ask(&mut c, identify(1, 0).with_data(4095, false)).0, Status::SGL_LENGTH.dnr());
}

#[test]
fn logs_are_told_from_any_offset_and_no_further_than_their_end() {
    let (mut c, _) = enabled(&vol0());
    for page in [0, 1, 2, 3, 4, 5, 0x0c] {
        let (status, _, whole) = ask(&mut c, get_log(page, 4096, 0));
        assert_eq!(status, Status::SUCCESS, "log {page}");
        assert_eq!(ask(&mut c, get_log(page, 8, 4)).2, whole[4..12], "log {page} at 4");
        assert_eq!(ask(&mut c, get_log(page, 4, 1 << 20)).0, Status::INVALID_FIELD.dnr());
    }
    assert_eq!(ask(&mut c, get_log(2, 4, 2)).0, Status::INVALID_FIELD.dnr(), "odd offset");
    assert_eq!(ask(&mut c, get_log(2, 512, 0).with_data(508, false)).0, Status::SGL_LENGTH.dnr());
    assert_eq!(ask(&mut c, get_log(log::DISCOVERY, 1024, 0)).0, Status::INVALID_LOG_PAGE.dnr());
    let ana = ask(&mut c, get_log(log::ANA, 52, 0)).2;
    assert_eq!((ana[8], ana[16], ana[20], ana[32], ana[48]), (1, 1, 1, 1, 1));
}

#[test]
fn discovery_lists_every_volume_at_every_port_and_says_when_that_changes() {
    let (mut c, _) = enabled(DISCOVERY_NQN);
    let all = ask(&mut c, get_log(log::DISCOVERY, 1024 * 5, 0)).2;
    assert_eq!((u64_at(&all, 0), u64_at(&all, 8)), (4, 4));
    let second = &all[2048..3072];
    assert_eq!((second[0], second[1], second[2], u16_at(second, 6)), (3, 2, 2, u16::MAX));
    assert!(second[32..].starts_with(b"4421 ") && second[512..].starts_with(b"::1 "));
    assert!(second[256..].starts_with(vol0().as_bytes()));
    let hosts = ask(&mut c, get_log(log::HOST_DISCOVERY, 2056, 0)).2;
    assert_eq!((u64_at(&hosts, 8), u32_at(&hosts, 20), u32_at(&hosts, 2048)), (1, 2056, 1032));
    assert!(hosts[1024 + 256..].starts_with(HOST.as_bytes()), "a host knows of itself");
    assert_eq!(ask(&mut c, get_log(log::SMART, 512, 0)).0, Status::INVALID_LOG_PAGE.dnr());
    assert_eq!(
        connect(&mut c, 1, 1, 0, DISCOVERY_NQN).map_err(|e| e.0),
        Err(Status::CONNECT_PARAMETER.dnr())
    );
    ask(&mut c, set(feature::ASYNC_EVENT, 1 << 31));
    c.admin(0, &Sqe::new(admin::ASYNC_EVENT, 8, 0), &[], Time(1));
    c.set_view(View { generation: 5, ..view() });
    assert!(told(&mut c).is_empty(), "nothing that discovery tells has changed");
    let volumes = vec![volume(1, "vol0", 1 << 30)];
    c.set_view(View { generation: 6, volumes, ..view() });
    let result = 2 | 0xf0 << 8 | 0x70 << 16;
    assert_eq!(told(&mut c), [Out::Complete { queue: 0, cid: 8, status: Status::SUCCESS, result }]);
    assert_eq!(u64_at(&ask(&mut c, get_log(log::DISCOVERY, 16, 0)).2, 0), 6);
}

#[test]
fn a_host_that_is_not_on_the_list_neither_sees_nor_reaches_the_volume_and_is_let_go() {
    let listed = |hosts: &[&str]| {
        let allowed_hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        View { volumes: vec![Volume { allowed_hosts, ..volume(1, "vol0", 1 << 30) }], ..view() }
    };
    let (mut c, _) = enabled(DISCOVERY_NQN);
    c.set_view(listed(&["nqn.other"]));
    assert_eq!(u64_at(&ask(&mut c, get_log(log::DISCOVERY, 16, 0)).2, 8), 0);
    assert_eq!(connect(&mut c, 1, 0, u16::MAX, &vol0()), Err((Status::CONNECT_HOST.dnr(), 0)));
    ask(&mut c, set(feature::ASYNC_EVENT, 1 << 31));
    c.admin(0, &Sqe::new(admin::ASYNC_EVENT, 8, 0), &[], Time(1));
    c.set_view(listed(&["nqn.other", "nqn.third"]));
    assert!(told(&mut c).is_empty(), "nothing changed for this host");
    c.set_view(listed(&["nqn.other", HOST]));
    assert!(matches!(told(&mut c)[..], [Out::Complete { queue: 0, cid: 8, .. }]));
    assert_eq!(u64_at(&ask(&mut c, get_log(log::DISCOVERY, 16, 0)).2, 8), 2);
    let id = connect(&mut c, 1, 0, u16::MAX, &vol0()).expect("on the list").cntlid;
    c.admin(1, &Sqe::property_set(1, property::CC, CC_ENABLE), &[], Time(1));
    connect(&mut c, 2, 1, id, &vol0()).expect("on the list");
    c.set_view(listed(&["nqn.other"]));
    let closed: Vec<QueueId> = told(&mut c).iter().map(Out::queue).collect();
    assert_eq!(closed, [1, 2], "both queues of the volume, and discovery stays");
    c.set_view(listed(&[]));
    assert!(connect(&mut c, 3, 0, u16::MAX, &vol0()).is_ok(), "an empty list lets any host in");
}

#[test]
fn a_taken_over_volume_lets_in_its_holder_alone_and_leaves_earlier_controllers_to_fail() {
    let held = |epoch, holder: &str| {
        let session = Session { epoch: SessionEpoch(epoch), holder: holder.to_owned() };
        View { volumes: vec![Volume { session, ..volume(1, "vol0", 1 << 30) }], ..view() }
    };
    let (mut c, id) = enabled(&vol0());
    connect(&mut c, 1, 0, u16::MAX, DISCOVERY_NQN).expect("accepted");
    c.admin(1, &Sqe::property_set(1, property::CC, CC_ENABLE), &[], Time(1));
    let found = |c: &mut Controllers| match c.admin(1, &get_log(log::DISCOVERY, 16, 0), &[], Time(1)) {
        Answer::Done { data, .. } => u64_at(&data, 8),
        Answer::Later => panic!("a log page waits"),
    };
    assert_eq!(connect(&mut c, 2, 1, id, &vol0()).expect("accepted").epoch, SessionEpoch(0));
    c.set_view(held(3, "nqn.other"));
    assert!(
        told(&mut c).iter().all(|out| !matches!(out, Out::Close { .. })),
        "it stays, and its commands fail"
    );
    assert_eq!(found(&mut c), 0);
    assert_eq!(connect(&mut c, 3, 0, u16::MAX, &vol0()), Err((Status::CONNECT_HOST.dnr(), 0)));
    assert_eq!(connect(&mut c, 3, 2, id, &vol0()), Err((Status::CONNECT_HOST.dnr(), 0)), "nor another queue");
    c.set_view(held(4, HOST));
    assert_eq!(found(&mut c), 2);
    let late = connect(&mut c, 3, 2, id, &vol0()).expect("it is the holder");
    assert_eq!(late.epoch, SessionEpoch(0), "a queue has the epoch of its controller");
    assert_eq!(connect(&mut c, 4, 0, u16::MAX, &vol0()).expect("accepted").epoch, SessionEpoch(4));
}

#[test]
fn a_grown_volume_is_told_once_until_the_log_was_read() {
    let (mut c, id) = enabled(&vol0());
    connect(&mut c, 1, 1, id, &vol0()).expect("accepted");
    ask(&mut c, set(feature::ASYNC_EVENT, u32::MAX));
    for cid in 8..12 {
        assert_eq!(c.admin(0, &Sqe::new(admin::ASYNC_EVENT, cid, 0), &[], Time(1)), Answer::Later);
    }
    assert_eq!(ask(&mut c, Sqe::new(admin::ASYNC_EVENT, 12, 0)).0, Status::AER_LIMIT.dnr());
    let grown = |gib: u64| View { volumes: vec![volume(1, "vol0", gib << 30)], ..view() };
    c.set_view(grown(2));
    let events = told(&mut c);
    assert!(matches!(events[0], Out::Complete { cid: 8, result: 0x04_0002, .. }), "{events:?}");
    assert!(matches!(events[1], Out::Namespace { queue: 1, namespace: Some(n) } if n.bytes == 2 << 30));
    c.set_view(grown(3));
    assert!(matches!(told(&mut c)[..], [Out::Namespace { .. }]), "not told twice");
    assert_eq!(
        u32_at(&ask(&mut c, get_log(log::CHANGED_NS, 4096, 0).with(10, 0x3ff << 16 | 1 << 15 | 4)).2, 0),
        1
    );
    assert!(told(&mut c).is_empty(), "read, but the event is retained");
    ask(&mut c, get_log(log::CHANGED_NS, 4096, 0));
    assert!(matches!(told(&mut c)[..], [Out::Complete { cid: 9, .. }]), "the second change");
    c.set_view(View { volumes: vec![], ..view() });
    c.set_view(View { ana: Ana::Inaccessible, ..c.view().clone() });
    let events = told(&mut c);
    assert!(events.contains(&Out::Namespace { queue: 1, namespace: None }), "{events:?}");
    assert!(events.iter().any(|e| matches!(e, Out::Complete { result: 0x0c_0302, .. })), "{events:?}");
}

#[test]
fn features_tell_what_was_set_and_refuse_what_is_not_there() {
    let (mut c, _) = enabled(&vol0());
    let get = |feature: u8| Sqe::new(admin::GET_FEATURES, 1, 0).with(10, feature.into());
    assert_eq!(ask(&mut c, set(feature::QUEUES, 0xffff)).0, Status::INVALID_FIELD.dnr());
    assert_eq!(ask(&mut c, set(feature::QUEUES, 999 << 16 | 999)).1, 127 << 16 | 127);
    assert_eq!(ask(&mut c, get(feature::QUEUES)).1, 127 << 16 | 127);
    ask(&mut c, set(feature::KEEP_ALIVE, 7_000));
    assert_eq!(ask(&mut c, get(feature::KEEP_ALIVE)).1, 7_000);
    assert_eq!(ask(&mut c, get(feature::TEMPERATURE)).1, 363);
    ask(&mut c, set(feature::ARBITRATION, 3));
    assert_eq!(ask(&mut c, get(feature::ARBITRATION)).1, 3);
    assert_eq!(ask(&mut c, set(feature::ARBITRATION, 3).with(10, 1 << 31 | 1)).0, Status::NOT_SAVEABLE.dnr());
    for unknown in [0, feature::WRITE_CACHE, 0x80, 0xff] {
        assert_eq!(ask(&mut c, set(unknown, 1)).0, Status::INVALID_FIELD.dnr());
        assert_eq!(ask(&mut c, get(unknown)).0, Status::INVALID_FIELD.dnr());
    }
    assert_eq!(ask(&mut c, get(feature::ARBITRATION).with(10, 1 << 8 | 1)).0, Status::INVALID_FIELD.dnr());
    let host_id = get(feature::HOST_ID).with(11, 1).with_data(16, false);
    assert_eq!(ask(&mut c, host_id).2, [1; 16]);
    assert_eq!(ask(&mut c, set(feature::HOST_ID, 1)).0, Status::SEQUENCE.dnr());
    for opcode in [0x0d, 0x10, 0x80, 0xff] {
        assert_eq!(ask(&mut c, Sqe::new(opcode, 1, 1)).0, Status::INVALID_OPCODE.dnr());
    }
    let mut unknown = Sqe::property_get(1, 0, true);
    unknown.0[4] = 0x55;
    assert_eq!(ask(&mut c, unknown).0, Status::INVALID_OPCODE.dnr());
}

#[test]
fn abort_ends_what_waits_and_nothing_else() {
    let (mut c, _) = enabled(&vol0());
    c.admin(0, &Sqe::new(admin::ASYNC_EVENT, 8, 0), &[], Time(1));
    let abort = |qid: u32, cid: u32| Sqe::new(admin::ABORT, 1, 0).with(10, cid << 16 | qid);
    assert_eq!(ask(&mut c, abort(0, 9)).1, 1);
    assert_eq!(ask(&mut c, abort(1, 8)).1, 1);
    assert_eq!(ask(&mut c, abort(0, 8)).1, 0);
    assert_eq!(told(&mut c), [Out::Complete { queue: 0, cid: 8, status: Status::ABORTED, result: 0 }]);
}

#[test]
fn names_are_the_same_everywhere_and_for_ever() {
    let id = VolumeId(0x0102_0304);
    assert_eq!(
        identify::nguid(&CLUSTER, id),
        *b"\xab\xab\xab\xab\xab\xab\xab\xab\xab\xab\xab\xab\x01\x02\x03\x04"
    );
    assert_eq!(identify::uuid(&CLUSTER, id)[6..9], [0x8b, 0xab, 0xab]);
    assert_eq!(identify::eui64(&CLUSTER, id), [0xaa, 0xab, 0xab, 0xab, 1, 2, 3, 4]);
    assert_eq!(vol0(), "nqn.2026-01.io.ashlar:abababababababababababababababab:vol0");
}

#[test]
fn the_health_log_tells_what_hosts_did_with_the_volume_also_through_controllers_that_are_gone() {
    let (mut c, _) = enabled(&vol0());
    let mut served = Served::default();
    served.count(IoCommand::Read, 512_000, Status::SUCCESS);
    served.count(IoCommand::Verify, 512, Status::UNRECOVERED_READ);
    served.count(IoCommand::Write, 4096, Status::SUCCESS);
    served.count(IoCommand::Flush, 0, Status::SUCCESS);
    c.served(0, &served);
    let smart = |c: &mut Controllers| {
        let log = ask(c, get_log(log::SMART, 512, 0)).2;
        [32, 48, 64, 80, 160].map(|at| u64_at(&log, at))
    };
    assert_eq!(smart(&mut c), [2, 1, 1, 1, 1], "units read and written, commands, media errors");
    c.closed(0);
    c.served(0, &served);
    connect(&mut c, 0, 0, u16::MAX, &vol0()).expect("accepted");
    ask(&mut c, Sqe::property_set(1, property::CC, CC_ENABLE));
    assert_eq!(smart(&mut c), [2, 1, 1, 1, 1], "what an unknown connection tells is nobody's");
}
