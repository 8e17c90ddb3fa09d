//! Memory for weights: aligned, zeroed, and on large pages where the system has them.
//!
//! A decode step streams every weight it touches once. With pages of 4 KiB the walk of the page table costs a fifth of the
//! bandwidth (measured: 29 GB/s against 35 on two Zen 4 cores), so large buffers ask for pages of 2 MiB.

use memmap2::MmapMut;

/// The large page of x86-64 and of AArch64 with a 4 KiB granule.
const LARGE_PAGE_BYTES: usize = 2 << 20;
const LINE_WORDS: usize = 16;

/// A cache line: the least alignment.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; LINE_WORDS]);

/// A fixed number of 32-bit words, all bits zero at first.
pub(super) struct Words {
    memory: Memory,
    len: usize,
}

enum Memory {
    Lines(Vec<Line>),
    /// Words start at the byte named: the first large page in the mapping.
    Mapped(MmapMut, usize),
}

impl Words {
    pub fn zeroed(len: usize) -> Words {
        let bytes = len.checked_mul(size_of::<u32>()).expect("a matrix fits the address space");
        let mapped = (bytes >= LARGE_PAGE_BYTES).then(|| Memory::map(bytes)).flatten();
        let lines = || Memory::Lines(vec![Line([0; LINE_WORDS]); len.div_ceil(LINE_WORDS)]);
        Words { memory: mapped.unwrap_or_else(lines), len }
    }

    fn start(&self) -> *const u32 {
        match &self.memory {
            Memory::Lines(lines) => lines.as_ptr().cast(),
            Memory::Mapped(mapping, first) => mapping[*first..].as_ptr().cast(),
        }
    }
}

impl Memory {
    /// Fresh pages are zero. Where the system has none to give, the heap decides what happens.
    fn map(bytes: usize) -> Option<Memory> {
        let mapping = MmapMut::map_anon(bytes.checked_add(LARGE_PAGE_BYTES)?).ok()?;
        #[cfg(target_os = "linux")]
        // Refused where the system has no large pages: small ones serve.
        let _ = mapping.advise(memmap2::Advice::HugePage);
        let first = mapping.as_ptr().align_offset(LARGE_PAGE_BYTES);
        Some(Memory::Mapped(mapping, first))
    }
}

impl std::ops::Deref for Words {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // SAFETY: both kinds of memory hold at least `len` initialised words from `start` on, aligned to a cache line or a page.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl std::ops::DerefMut for Words {
    fn deref_mut(&mut self) -> &mut [u32] {
        let start = match &mut self.memory {
            Memory::Lines(lines) => lines.as_mut_ptr().cast(),
            Memory::Mapped(mapping, first) => mapping[*first..].as_mut_ptr().cast(),
        };
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}
