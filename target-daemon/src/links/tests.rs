//! Links over the simulated network.

use super::*;
use protocol::map::TargetEntry;
use protocol::peer::Fetch;
use protocol::types::{CopysetId, TargetId};
use reactor::Listener;
use reactor::sim::{SimReactor, SimWorld};
use std::sync::Arc;

const LINK: u8 = 1;
const CONNECT: u8 = 2;
const ACCEPT: u8 = 3;

fn at(target: u32) -> ShardAddr {
    ShardAddr { target: TargetId(target), shard: 0 }
}

fn address(target: u32) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, target as u8], 7000))
}

/// The links of one shard, and the loop around them.
struct Side {
    reactor: SimReactor,
    links: Links,
    listener: Listener,
    completions: Vec<Completion>,
    heard: Vec<u32>,
}

impl Side {
    fn start(world: &SimWorld, target: u32, map: &Arc<ClusterMap>) -> Self {
        let mut reactor = world.start(target as usize, 8 << 20).unwrap();
        let listener = reactor.listen(address(target)).unwrap();
        let mut links = Links::new(LINK, CONNECT, at(target), 1, Vec::new());
        links.set_map(map, reactor.now());
        reactor.submit(Owner { kind: ACCEPT, index: 0 }.token(0), Op::Accept { listener });
        Self { reactor, links, listener, completions: Vec::new(), heard: Vec::new() }
    }
    fn turn(&mut self) {
        self.reactor.turn(self.links.next_timeout(), &mut self.completions);
        for completion in std::mem::take(&mut self.completions) {
            match Owner::split(completion.token).0.kind {
                LINK => self.links.on_completion(&mut self.reactor, completion),
                CONNECT => self.links.connected(&mut self.reactor, completion),
                ACCEPT => {
                    if let Ok(Output::Accepted { socket, .. }) = completion.result {
                        self.links.accepted(&mut self.reactor, socket);
                    }
                    let token = Owner { kind: ACCEPT, index: 0 }.token(0);
                    self.reactor.submit(token, Op::Accept { listener: self.listener });
                }
                _ => {}
            }
        }
        let now = self.reactor.now();
        self.links.tick(&mut self.reactor, now);
        self.links.pump(&mut self.reactor);
        let mut events = Vec::new();
        self.links.take_events(&mut events);
        for event in events {
            if let LinkEvent::Message { message: PeerMessage::Fetch { copyset, .. }, .. } = event {
                self.heard.push(copyset.0);
            }
        }
    }
    /// A message that tells a number.
    fn say(&mut self, to: u32, number: u32) -> bool {
        let message = PeerMessage::Fetch { copyset: CopysetId(number), fetch: Fetch::Begin };
        self.reactor.waker().wake();
        self.links.send(at(to), &message, &Mems::new())
    }
}

/// Turns the sides (the first is target 0) until a moment.
fn run(world: &SimWorld, sides: &mut [Side], ms: u64) {
    let until = world.now() + Span::ms(ms);
    while let Some(node) = world.step(until) {
        sides[node].turn();
    }
}

#[test]
fn what_comes_late_on_a_link_that_was_replaced_is_dropped() {
    let world = SimWorld::new(1, 2);
    let entry = |target| TargetEntry { peers: vec![address(target)], ..TargetEntry::default() };
    let targets = [0, 1].map(|target| (TargetId(target), entry(target))).into();
    let map = Arc::new(ClusterMap { targets, ..ClusterMap::default() });
    let mut sides = [0, 1].map(|target| Side::start(&world, target, &map));
    run(&world, &mut sides, 1000);
    assert!(sides[1].say(0, 7));
    run(&world, &mut sides, 1000);
    assert_eq!(sides[0].heard, [7]);
    // A request is long on its way; its sender has given the link up meanwhile, and asks again.
    world.detour(1, 0, Span::ms(4000));
    assert!(sides[1].say(0, 8));
    run(&world, &mut sides, 100);
    world.reset_one_side(1, 0);
    run(&world, &mut sides, 1000);
    assert!(sides[1].say(0, 9), "there is a new link");
    run(&world, &mut sides, 1000);
    assert_eq!(sides[0].heard, [7, 9]);
    run(&world, &mut sides, 5000);
    assert_eq!(sides[0].heard, [7, 9], "the first of the two would overtake the second");
}
