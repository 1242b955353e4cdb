//! Bytes on cache lines.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A fixed number of bytes, zero at first, aligned to 64. The system gives pages as they are written.
pub(crate) struct Aligned {
    /// Where the allocation begins, and its layout.
    begin: NonNull<u8>,
    layout: Layout,
    /// Bytes before the first line, and from there on.
    skip: usize,
    length: usize,
}

const LINE: usize = 64;

impl Aligned {
    /// Returns `length` zeros; `None` past the address space.
    pub(crate) fn zeros(length: usize) -> Option<Self> {
        // A larger alignment would make the allocator write the zeros itself, and take all pages at once.
        let layout = Layout::from_size_align(length.checked_add(LINE)?, 1).ok()?;
        // SAFETY: the layout is not empty.
        let begin = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        let skip = begin.as_ptr().align_offset(LINE);
        Some(Aligned { begin, layout, skip: skip.min(LINE), length })
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and initialised: `skip` and `length` are inside the layout.
        unsafe { std::slice::from_raw_parts(self.begin.as_ptr().add(self.skip), self.length) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.begin.as_ptr().add(self.skip), self.length) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.begin.as_ptr(), self.layout) }
    }
}

// SAFETY: it owns plain bytes.
unsafe impl Send for Aligned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Aligned {}
