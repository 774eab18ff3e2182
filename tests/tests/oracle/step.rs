//! One decision at a time: the same state, the same message, the same answer.

use super::ours::{Ours, log};
use super::theirs::{Theirs, as_theirs, translate};
use super::{Dice, body, schedules};
use copyset::{HardState, Kind, Message};
use protocol::raft::{AppendOutcome, Round, Standing};
use protocol::types::{LogIndex, TargetId, Term};
use raft::eraftpb::{Message as TheirMessage, MessageType};

const STANDING: Standing = Standing { counts: true, confirms: true, needs_install: false };

/// Terms of a log, never falling, none above `most`.
fn terms(dice: &mut Dice, length: u64, from: u64, most: u64) -> Vec<u64> {
    let mut term = from;
    let mut next = || {
        term = (term + [0, 0, 0, 1, 2][dice.below(5) as usize]).min(most);
        term
    };
    (0..length).map(|_| next()).collect()
}

fn message(kind: MessageType, from: u64, to: u64, term: u64) -> TheirMessage {
    let mut message = TheirMessage::default();
    message.set_msg_type(kind);
    message.set_from(from);
    message.set_to(to);
    message.set_term(term);
    message
}

#[test]
fn votes_are_given_to_the_same_candidates() {
    let mut granted = 0;
    for seed in 0..schedules(3_000) {
        let dice = &mut Dice(seed);
        let length = dice.below(5);
        let terms = terms(dice, length, 1, 4);
        let last = terms.last().copied().unwrap_or(0);
        let term = last + dice.below(3);
        let vote = [None, Some(TargetId(1)), Some(TargetId(2)), Some(TargetId(3))][dice.below(4) as usize];
        let hard = HardState { term: Term(term), vote: vote.filter(|_| term > 0) };
        let (mut ours, mut theirs) =
            (Ours::new(1, 3, hard, log(&terms), 0), Theirs::new(1, 3, hard, &log(&terms), 0));

        let asked = (term + dice.below(3)).saturating_sub(dice.below(2)).max(1);
        let (index, log_term) = (dice.below(7), (last + dice.below(3)).saturating_sub(1).min(asked));
        let kind = Kind::Vote { last_index: LogIndex(index), last_term: Term(log_term), transfer: None };
        ours.handle(2, Message { term: Term(asked), kind });
        let mut request = message(MessageType::MsgRequestVote, 2, 1, asked);
        request.set_index(index);
        request.set_log_term(log_term);
        theirs.handle(request);

        let ours_granted = ours.sent.iter().any(|(_, m)| m.kind == Kind::VoteReply { granted: true });
        let reply =
            |m: &TheirMessage| m.get_msg_type() == MessageType::MsgRequestVoteResponse && !m.get_reject();
        let theirs_granted = theirs.sent.iter().any(reply);
        let hard_now = ours.replica.hard_state();
        let ours_hard = (hard_now.term.0, hard_now.vote.map_or(0, |v| u64::from(v.0)));
        let case =
            format!("seed {seed}: {hard:?}, log {terms:?}, asked in {asked} with {index} of {log_term}");
        assert_eq!(ours_granted, theirs_granted, "{case}: whether the vote is given");
        assert_eq!(ours_hard, theirs.hard(), "{case}: term and vote");
        granted += u64::from(ours_granted);
    }
    assert!(granted > 100, "votes were given too seldom to mean anything: {granted}");
}

/// When the replica last heard the leader of its term.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Heard {
    Nobody,
    JustNow,
    LongAgo,
}

#[test]
fn pre_votes_are_given_to_the_same_candidates() {
    let (mut granted, mut refused, mut silent) = (0, 0, 0);
    for seed in 0..schedules(3_000) {
        let dice = &mut Dice(seed);
        let length = dice.below(5);
        let terms = terms(dice, length, 1, 4);
        let last = terms.last().copied().unwrap_or(0);
        let term = last.max(1) + dice.below(3);
        let vote = [None, Some(TargetId(1)), Some(TargetId(2)), Some(TargetId(3))][dice.below(4) as usize];
        let hard = HardState { term: Term(term), vote };
        let mut ours = Ours::new(1, 3, hard, log(&terms), 0);
        let mut theirs = Theirs::new_bound(1, 3, hard, &log(&terms));
        let heard = [Heard::Nobody, Heard::JustNow, Heard::LongAgo][dice.below(3) as usize];
        hear(&mut ours, &mut theirs, heard, term);

        // The candidate's term, and its log.
        let its = (term + dice.below(3)).saturating_sub(dice.below(3)).max(1);
        let (index, log_term) = (dice.below(7), (last + dice.below(3)).saturating_sub(1).min(its));
        let campaign = Term(its + 1);
        let (last_index, last_term) = (LogIndex(index), Term(log_term));
        ours.handle(2, Message { term: Term(its), kind: Kind::PreVote { campaign, last_index, last_term } });
        let mut request = message(MessageType::MsgRequestPreVote, 2, 1, campaign.0);
        request.set_index(index);
        request.set_log_term(log_term);
        theirs.handle(request);

        let ours_said = ours.sent.iter().find_map(|(_, m)| match m.kind {
            Kind::PreVoteReply { granted, .. } => Some(granted),
            _ => None,
        });
        let reply = |m: &&TheirMessage| m.get_msg_type() == MessageType::MsgRequestPreVoteResponse;
        let theirs_said = theirs.sent.iter().find(reply).map(|m| !m.get_reject());
        let case = format!(
            "seed {seed}: {hard:?}, log {terms:?}, heard {heard:?}, asked by one in {its} with {index} of {log_term}"
        );
        if campaign.0 == term {
            // For the present term raft-rs may say yes, if it has not voted otherwise. Ours tells the
            // present term first: whoever asked then asks for the next one.
            assert_eq!(ours_said, Some(false), "{case}: whether it is refused");
        } else {
            assert_eq!(ours_said, theirs_said, "{case}: whether the pre-vote is given, if at all");
        }
        // A pre-vote binds nobody: raft-rs stays in its term, ours goes to the candidate's (not the one it
        // campaigns for), unless it is bound to a leader.
        let bound = heard == Heard::JustNow;
        let expected = if its > term && !bound { (its, 0) } else { theirs.hard() };
        let now = ours.replica.hard_state();
        assert_eq!((now.term.0, now.vote.map_or(0, |v| u64::from(v.0))), expected, "{case}: term and vote");
        assert_eq!(theirs.hard(), (term, hard.vote.map_or(0, |v| v.0.into())), "{case}: theirs");
        match ours_said {
            Some(true) => granted += 1,
            Some(false) => refused += 1,
            None => silent += 1,
        }
    }
    let all = [granted, refused, silent];
    assert!(all.iter().all(|n| *n > 200), "one-sided: granted, refused, silent {all:?}");
}

#[test]
fn whoever_hears_a_leader_votes_for_nobody_else() {
    let (mut granted, mut silent) = (0, 0);
    for seed in 0..schedules(1_000) {
        let dice = &mut Dice(seed);
        let term = 1 + dice.below(3);
        let hard = HardState { term: Term(term), vote: None };
        let mut ours = Ours::new(1, 3, hard, Vec::new(), 0);
        let mut theirs = Theirs::new_bound(1, 3, hard, &[]);
        let heard = [Heard::Nobody, Heard::JustNow, Heard::LongAgo][dice.below(3) as usize];
        hear(&mut ours, &mut theirs, heard, term);
        let asked = term + 1 + dice.below(2);
        let kind = Kind::Vote { last_index: LogIndex(0), last_term: Term(0), transfer: None };
        ours.handle(2, Message { term: Term(asked), kind });
        theirs.handle(message(MessageType::MsgRequestVote, 2, 1, asked));
        let ours_granted = ours.sent.iter().any(|(_, m)| m.kind == Kind::VoteReply { granted: true });
        let reply =
            |m: &TheirMessage| m.get_msg_type() == MessageType::MsgRequestVoteResponse && !m.get_reject();
        let case = format!("seed {seed}: {hard:?}, heard {heard:?}, asked in {asked}");
        assert_eq!(ours_granted, theirs.sent.iter().any(reply), "{case}: whether the vote is given");
        assert_eq!(ours.replica.term().0, theirs.hard().0, "{case}: the term");
        granted += u64::from(ours_granted);
        silent += u64::from(!ours_granted);
    }
    assert!(granted > 200 && silent > 200, "one-sided: {granted} given, {silent} not");
}

/// Replica 3 is heard as the leader of `term`.
fn hear(ours: &mut Ours, theirs: &mut Theirs, heard: Heard, term: u64) {
    if heard == Heard::Nobody {
        return;
    }
    let round = Round { number: 1, sent_ns: 1 };
    let kind = Kind::Heartbeat { round, commit: LogIndex(0), sleep: false, install: None };
    ours.handle(3, Message { term: Term(term), kind });
    theirs.handle(message(MessageType::MsgHeartbeat, 3, 1, term));
    if heard == Heard::LongAgo {
        ours.let_time_pass();
        theirs.let_time_pass();
    }
    ours.sent.clear();
    theirs.sent.clear();
}

#[test]
fn followers_take_the_same_entries() {
    let (mut taken, mut refused) = (0, 0);
    for seed in 0..schedules(3_000) {
        let dice = &mut Dice(seed);
        // Both logs share a beginning, within which all is committed; then they may part.
        let length = dice.below(4);
        let common = terms(dice, length, 1, 3);
        let branch = common.last().copied().unwrap_or(1);
        let tail = |dice: &mut Dice, most| {
            let length = dice.below(4);
            [common.clone(), terms(dice, length, branch, most)].concat()
        };
        let (mine, leaders) = (tail(dice, 4), tail(dice, 5));
        let commit = dice.below(common.len() as u64 + 1);
        let last = mine.last().copied().unwrap_or(0);
        let hard = HardState { term: Term(last + dice.below(2)), vote: None };
        let term = leaders.last().copied().unwrap_or(0).max(hard.term.0).max(1);
        let (mut ours, mut theirs) =
            (Ours::new(1, 3, hard, log(&mine), commit), Theirs::new(1, 3, hard, &log(&mine), commit));

        // Before what is committed raft-rs says so at once and looks no further.
        let prev = commit + dice.below(leaders.len() as u64 - commit + 1);
        let count = dice.below(leaders.len() as u64 - prev + 1);
        let entries: Vec<_> = log(&leaders).drain(prev as usize..(prev + count) as usize).collect();
        let prev_term = prev.checked_sub(1).map_or(0, |at| leaders[at as usize]);
        let leader_commit = dice.below(leaders.len() as u64 + 1);
        let mut append = message(MessageType::MsgAppend, 2, 1, term);
        append.set_index(prev);
        append.set_log_term(prev_term);
        append.set_commit(leader_commit);
        append.set_entries(entries.iter().map(translate).collect::<Vec<_>>().into());
        theirs.handle(append);
        let kind = Kind::Append {
            round: Round { number: 1, sent_ns: 1 },
            prev_index: LogIndex(prev),
            prev_term: Term(prev_term),
            commit: LogIndex(leader_commit),
            entries: entries.into(),
        };
        ours.handle(2, Message { term: Term(term), kind });

        let case = format!("seed {seed}: {mine:?} committed {commit}, gets {leaders:?} {prev}+{count}");
        assert_eq!(as_theirs(&ours), theirs.entries(), "{case}: the log");
        assert_eq!(ours.replica.commit_index().0, theirs.commit(), "{case}: the commit index");
        let accepts = |m: &TheirMessage| !m.get_reject() && m.get_index() >= prev;
        let theirs_accepted = theirs.sent.iter().any(accepts);
        let outcomes: Vec<_> = ours.sent.iter().filter_map(|(_, m)| outcome(&m.kind)).collect();
        let rejected = |o: &AppendOutcome| matches!(o, AppendOutcome::Rejected { .. });
        let ours_accepted = !outcomes.iter().any(rejected);
        assert_eq!(ours_accepted, theirs_accepted, "{case}: whether it is taken");
        if ours_accepted {
            // A first word of what is committed anyway may precede.
            let last = AppendOutcome::Matched { up_to: LogIndex(prev + count) };
            assert_eq!(outcomes.last(), Some(&last), "{case}: how far it is acknowledged");
        }
        taken += u64::from(theirs_accepted);
        refused += u64::from(!theirs_accepted);
    }
    assert!(taken > 200 && refused > 200, "one-sided: {taken} taken, {refused} refused");
}

fn outcome(kind: &Kind) -> Option<AppendOutcome> {
    match kind {
        Kind::AppendReply { outcome, .. } => Some(*outcome),
        _ => None,
    }
}

#[test]
fn leaders_commit_the_same_entries() {
    let mut committed = 0;
    for seed in 0..schedules(1_500) {
        let dice = &mut Dice(seed);
        let voters = [3, 5][dice.below(2) as usize];
        let length = dice.below(6);
        let terms = terms(dice, length, 1, 5);
        let term = terms.last().copied().unwrap_or(0) + dice.below(2);
        let hard = HardState { term: Term(term), vote: None };
        let commit = dice.below(terms.len() as u64 / 2 + 1);
        let mut ours = Ours::new(1, voters, hard, log(&terms), commit);
        let mut theirs = Theirs::new(1, voters, hard, &log(&terms), commit);
        elect(&mut ours, &mut theirs, voters);

        for step in 0..12 {
            if dice.below(3) == 0 {
                let number = 1_000 + step;
                ours.propose(number);
                theirs.propose(number);
            } else {
                let from = 2 + dice.below(u64::from(voters) - 1) as u32;
                acknowledge(dice, &mut ours, &mut theirs, from);
            }
            let case = format!("seed {seed}, step {step}: {voters} voters, log {terms:?} committed {commit}");
            assert_eq!(ours.replica.commit_index().0, theirs.commit(), "{case}");
        }
        committed += u64::from(theirs.commit() > commit);
    }
    assert!(committed > 200, "too little was committed to mean anything: {committed}");
}

/// All others vote for replica 1.
fn elect(ours: &mut Ours, theirs: &mut Theirs, voters: u32) {
    let term = Term(ours.replica.term().0 + 1);
    ours.tick();
    theirs.campaign();
    for from in 2..=voters {
        let kind = Kind::PreVoteReply { campaign: term, granted: true };
        ours.handle(from, Message { term: ours.replica.term(), kind });
        theirs.handle(message(MessageType::MsgRequestPreVoteResponse, from.into(), 1, term.0));
    }
    for from in 2..=voters {
        ours.handle(from, Message { term, kind: Kind::VoteReply { granted: true } });
        theirs.handle(message(MessageType::MsgRequestVoteResponse, from.into(), 1, term.0));
    }
    assert!(ours.leads() && theirs.leads(), "all voted for it");
    assert_eq!(as_theirs(ours), theirs.entries(), "a new leader appends one entry of its own");
}

/// `from` has what the leader has, up to a drawn entry.
fn acknowledge(dice: &mut Dice, ours: &mut Ours, theirs: &mut Theirs, from: u32) {
    let up_to = dice.below(ours.replica.last_index().0 + 1);
    let round = ours.sent.iter().rev().filter(|(to, _)| *to == from).find_map(|(_, m)| match m.kind {
        Kind::Append { round, .. } => Some(round),
        _ => None,
    });
    let round = round.expect("a new leader sends to everybody");
    let outcome = AppendOutcome::Matched { up_to: LogIndex(up_to) };
    let kind = Kind::AppendReply { round, standing: STANDING, outcome };
    ours.handle(from, Message { term: ours.replica.term(), kind });
    let mut reply = message(MessageType::MsgAppendResponse, from.into(), 1, theirs.hard().0);
    reply.set_index(up_to);
    theirs.handle(reply);
}

#[test]
fn a_number_is_found_again_in_a_proposal() {
    let entry = copyset::Entry { term: Term(1), index: LogIndex(1), body: body(7) };
    assert_eq!(super::theirs::number(&entry), Some(7));
}
