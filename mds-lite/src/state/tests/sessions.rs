//! Hazards of sessions: two holders at once, a lease that outlives its holder, an epoch given out twice.

use super::super::sessions::{Attach, Attached};
use super::*;

const V: VolumeId = VolumeId(1);

fn ready() -> Mds {
    let mut mds = Mds::ready(1 << 40);
    mds.create("vol0", GIB).unwrap();
    mds
}

fn attach(mds: &mut Mds, holder: &str, exclusive: bool, take_over: bool) -> Result<u64, ProblemKind> {
    let request = Attach { volume: VolumeRef::Id(V), holder: holder.into(), exclusive, take_over };
    mds.run(Command::Attach(request)).map_err(|problem| problem.kind)?;
    let session = &mds.state.map().volumes[&V].session;
    assert_eq!(session.holder, if exclusive { holder } else { "" }, "the map tells who may attach");
    assert_eq!(session.epoch.0, mds.state.session(V).epoch);
    Ok(session.epoch.0)
}

fn detach(mds: &mut Mds, holder: &str) -> Result<u64, ProblemKind> {
    let volume = VolumeRef::Id(V);
    mds.run(Command::Detach { volume, holder: holder.into() }).map_err(|problem| problem.kind)?;
    Ok(mds.state.session(V).epoch)
}

fn report(mds: &mut Mds, holder: &str, epoch: u64) {
    let attached = vec![Attached { volume: V, holder: holder.into(), epoch: SessionEpoch(epoch) }];
    let beat = Heartbeat { attached, ..beat(2, &[]) };
    mds.run(Command::Heartbeat(beat)).unwrap();
}

#[test]
fn an_exclusive_hold_ends_others_only_by_take_over_or_when_its_lease_is_over() {
    let mut mds = ready();
    let first = attach(&mut mds, "a", true, false).unwrap();
    assert_eq!(attach(&mut mds, "a", true, false), Ok(first), "asked again");
    assert_eq!(attach(&mut mds, "b", true, false), Err(ProblemKind::InUse));
    assert_eq!(attach(&mut mds, "b", false, false), Err(ProblemKind::InUse));
    let second = attach(&mut mds, "b", true, true).unwrap();
    assert!(second > first);
    mds.now = mds.now + Span::ms(29_000);
    report(&mut mds, "b", first);
    report(&mut mds, "c", second);
    mds.now = mds.now + Span::ms(1_000);
    let third = attach(&mut mds, "a", true, false).unwrap();
    assert!(third > second, "neither an old epoch nor a stranger renewed it");
    mds.now = mds.now + Span::ms(29_000);
    report(&mut mds, "a", third);
    mds.now = mds.now + Span::ms(29_000);
    assert_eq!(attach(&mut mds, "b", true, false), Err(ProblemKind::InUse), "renewed");
    assert_eq!(mds.state.lease(V, "a", mds.now), (Some(Span::ms(1_000).0), vec![TargetId(2)]));
    assert!(attach(&mut mds, "a", true, true).unwrap() > third, "what it had attached before is ended");
}

#[test]
fn shared_holders_come_and_go_under_one_epoch_and_an_exclusive_one_ends_them() {
    let mut mds = ready();
    assert_eq!((attach(&mut mds, "a", false, false), attach(&mut mds, "b", false, false)), (Ok(0), Ok(0)));
    assert_eq!(detach(&mut mds, "a"), Ok(0));
    assert_eq!(detach(&mut mds, "a"), Err(ProblemKind::NotFound));
    assert_eq!(attach(&mut mds, "c", true, false), Err(ProblemKind::InUse), "b has it");
    let exclusive = attach(&mut mds, "c", true, true).unwrap();
    assert_eq!(mds.state.session(V).holders, ["c".to_owned()].into());
    let after = detach(&mut mds, "c").unwrap();
    assert!(exclusive > 0 && after > exclusive, "what it still has on its way is refused");
    assert_eq!(attach(&mut mds, "d", false, false), Ok(after));
    assert!(attach(&mut mds, "d", true, false).unwrap() > after, "from shared to exclusive");
}

#[test]
fn a_restarted_mds_knows_who_holds_a_volume_and_gives_each_a_whole_lease() {
    let mut mds = ready();
    let first = attach(&mut mds, "a", true, false).unwrap();
    let mut mds = mds.restart();
    mds.now = Time::default() + Span::ms(29_000);
    assert_eq!(attach(&mut mds, "b", true, false), Err(ProblemKind::InUse));
    mds.now = Time::default() + Span::ms(30_000);
    assert!(attach(&mut mds, "b", true, false).unwrap() > first);
}

#[test]
fn epochs_are_given_out_once_over_all_volumes() {
    let mut mds = ready();
    mds.create("vol1", GIB).unwrap();
    let first = attach(&mut mds, "a", true, false).unwrap();
    let request =
        Attach { volume: VolumeRef::Id(VolumeId(2)), holder: "a".into(), exclusive: true, take_over: false };
    mds.run(Command::Attach(request)).unwrap();
    assert!(mds.state.session(VolumeId(2)).epoch > first);
}
