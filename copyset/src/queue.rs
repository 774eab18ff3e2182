//! One thing that `VecDeque` has only in newer compilers than the workspace asks for.

use std::collections::VecDeque;

/// Takes the front if it is such a one.
pub(crate) fn pop_front_if<T>(queue: &mut VecDeque<T>, such: impl FnOnce(&T) -> bool) -> Option<T> {
    if queue.front().is_some_and(such) { queue.pop_front() } else { None }
}
