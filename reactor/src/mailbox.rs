//! Messages between cores, and between the control thread and a core.
//!
//! A bounded single-producer, single-consumer ring (`rtrb`) and the receiver's [`Waker`]: the
//! receiving loop polls its mailboxes each turn, and is woken only if it sleeps. A full mailbox
//! gives the message back: backpressure is the sender's business.
//!
//! Order of use on the receiving side: `reactor.turn(..)`, then poll. Whatever was posted
//! before a wake is then seen (see [`crate::Waker`]).

use crate::api::Waker;

/// The sending end.
pub struct MailboxSender<T> {
    ring: rtrb::Producer<T>,
    waker: Waker,
}

/// The receiving end.
pub struct MailboxReceiver<T> {
    ring: rtrb::Consumer<T>,
}

/// A mailbox of `capacity` messages towards the reactor that `waker` wakes.
pub fn mailbox<T>(capacity: usize, waker: Waker) -> (MailboxSender<T>, MailboxReceiver<T>) {
    let (producer, consumer) = rtrb::RingBuffer::new(capacity);
    (MailboxSender { ring: producer, waker }, MailboxReceiver { ring: consumer })
}

impl<T> MailboxSender<T> {
    /// Posts a message and wakes the receiver; a full mailbox gives it back.
    pub fn post(&mut self, message: T) -> Result<(), T> {
        self.post_quietly(message)?;
        self.waker.wake();
        Ok(())
    }

    /// Posts without waking; to be followed by one [`MailboxSender::wake`] after a batch.
    pub fn post_quietly(&mut self, message: T) -> Result<(), T> {
        self.ring.push(message).map_err(|rtrb::PushError::Full(message)| message)
    }

    /// Wakes the receiver.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Whether the receiver is gone.
    pub fn is_abandoned(&self) -> bool {
        self.ring.is_abandoned()
    }
}

impl<T> MailboxReceiver<T> {
    /// The oldest message.
    pub fn take(&mut self) -> Option<T> {
        self.ring.pop().ok()
    }

    /// Whether the sender is gone and all messages are taken.
    pub fn is_over(&self) -> bool {
        // In this order: a sender posts before it goes.
        self.ring.is_abandoned() && self.ring.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_mailbox_gives_the_message_back() {
        let (mut sender, mut receiver) = mailbox(2, Waker::simulated());
        assert_eq!((sender.post(1), sender.post(2), sender.post(3)), (Ok(()), Ok(()), Err(3)));
        assert_eq!(receiver.take(), Some(1));
        drop(sender);
        assert!(!receiver.is_over());
        assert_eq!((receiver.take(), receiver.take()), (Some(2), None));
        assert!(receiver.is_over());
    }
}
