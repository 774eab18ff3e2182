//! Slots with generations behind the small handles: a stale handle finds nothing.

/// A table whose keys are (index, generation).
pub(crate) struct Table<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    len: u32,
}

impl<T> Table<T> {
    pub(crate) fn new() -> Self {
        Self { entries: Vec::new(), free: Vec::new(), len: 0 }
    }

    pub(crate) fn insert(&mut self, value: T) -> (u32, u32) {
        self.len += 1;
        if let Some(index) = self.free.pop() {
            let entry = &mut self.entries[index as usize];
            entry.1 = Some(value);
            return (index, entry.0);
        }
        self.entries.push((1, Some(value)));
        (self.entries.len() as u32 - 1, 1)
    }

    pub(crate) fn get(&self, index: u32, generation: u32) -> Option<&T> {
        self.entries.get(index as usize).filter(|e| e.0 == generation)?.1.as_ref()
    }

    pub(crate) fn get_mut(&mut self, index: u32, generation: u32) -> Option<&mut T> {
        self.entries.get_mut(index as usize).filter(|e| e.0 == generation)?.1.as_mut()
    }

    pub(crate) fn remove(&mut self, index: u32, generation: u32) -> Option<T> {
        let entry = self.entries.get_mut(index as usize).filter(|e| e.0 == generation)?;
        let value = entry.1.take()?;
        entry.0 = entry.0.wrapping_add(1);
        self.free.push(index);
        self.len -= 1;
        Some(value)
    }

    /// All entries with their keys, in order of index.
    pub(crate) fn iter(&self) -> impl Iterator<Item = ((u32, u32), &T)> {
        self.entries.iter().enumerate().filter_map(|(i, e)| Some(((i as u32, e.0), e.1.as_ref()?)))
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(self).entries.into_iter().filter_map(|entry| entry.1)
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self::new()
    }
}
