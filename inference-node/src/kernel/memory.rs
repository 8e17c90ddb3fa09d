//! Memory for weights: aligned, zeroed, and on large pages where the system has them.
//!
//! A decode step streams every weight it touches once. With pages of 4 KiB the walk of the page table costs a fifth of the
//! bandwidth (measured: 29 GB/s against 35 on two Zen 4 cores), so large buffers ask for pages of 2 MiB.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A cache line: the least alignment.
const LINE_BYTES: usize = 64;
/// The large page of x86-64 and of AArch64 with a 4 KiB granule.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// A fixed number of 32-bit words, all bits zero at first.
pub(super) struct Words {
    start: NonNull<u32>,
    len: usize,
}

// SAFETY: Words owns its memory as a Box<[u32]> would.
unsafe impl Send for Words {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Words {}

impl Words {
    pub fn zeroed(len: usize) -> Words {
        let Some(layout) = Words::layout(len) else { return Words { start: NonNull::dangling(), len: 0 } };
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        let Some(start) = NonNull::new(memory.cast::<u32>()) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if layout.align() == LARGE_PAGE_BYTES {
            // SAFETY: the range is this allocation; the advice changes no content. Where it is refused, small pages serve.
            unsafe { libc::madvise(memory.cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the allocation has `len` words, and zeros are valid words. The first touch comes after the advice.
        unsafe { start.as_ptr().write_bytes(0, len) };
        Words { start, len }
    }

    /// `None` for no words at all.
    fn layout(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(size_of::<u32>()).expect("a matrix fits the address space");
        let align = if bytes >= LARGE_PAGE_BYTES { LARGE_PAGE_BYTES } else { LINE_BYTES };
        (bytes > 0).then(|| Layout::from_size_align(bytes, align).expect("a matrix fits the address space"))
    }
}

impl std::ops::Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // SAFETY: `start` is valid for `len` initialised words (or dangling and aligned, with none).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if let Some(layout) = Words::layout(self.len) {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) };
        }
    }
}
