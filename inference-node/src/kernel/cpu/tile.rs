//! The one matrix multiplication that everything uses: `c (+)= a b` on small blocks, a tile of registers at a time.

use super::simd::Vector;

/// Rows of `a` in one tile.
pub(super) const TILE_ROWS: usize = 6;

/// `c[m, n] (+)= a[m, k] b[k, n]`, each matrix row-major with its own row stride. Every element of `c` is one chain of `mul_add` over
/// k in ascending order, whatever the tile it falls in: that is the promise of one result.
///
/// The creator guarantees that the three ranges are valid, that `c` overlaps neither `a` nor `b`, and that no other thread touches `c`.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub a: *const f32,
    pub a_stride: usize,
    pub b: *const f32,
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Start from what `c` holds instead of zero.
    pub accumulate: bool,
}

impl Block {
    /// # Safety
    /// What the creator guarantees (see [`Block`]) holds, and the CPU has V's features. Reached through [`Vector::multiply`].
    #[inline(always)]
    pub unsafe fn tiles<V: Vector>(self) {
        let mut row = 0;
        while row < self.m {
            // SAFETY: row + rows <= m in each arm.
            unsafe {
                match self.m - row {
                    1 => self.strip::<V, 1>(row),
                    2 => self.strip::<V, 2>(row),
                    3 => self.strip::<V, 3>(row),
                    4 => self.strip::<V, 4>(row),
                    5 => self.strip::<V, 5>(row),
                    _ => self.strip::<V, TILE_ROWS>(row),
                }
            }
            row += TILE_ROWS;
        }
    }

    /// All columns of `ROWS` rows: the widest tiles that fit the registers first, single columns at the end.
    ///
    /// # Safety
    /// As for [`Block`], with `row + ROWS <= m`.
    #[inline(always)]
    unsafe fn strip<V: Vector, const ROWS: usize>(&self, row: usize) {
        let mut column = 0;
        // SAFETY: each tile ends at or before column n.
        unsafe {
            if ROWS * 8 <= V::ACCUMULATORS {
                while column + 8 * V::LANES <= self.n {
                    self.tile::<V, ROWS, 8>(row, column);
                    column += 8 * V::LANES;
                }
            }
            if ROWS * 4 <= V::ACCUMULATORS {
                while column + 4 * V::LANES <= self.n {
                    self.tile::<V, ROWS, 4>(row, column);
                    column += 4 * V::LANES;
                }
            }
            while column + 2 * V::LANES <= self.n {
                self.tile::<V, ROWS, 2>(row, column);
                column += 2 * V::LANES;
            }
            while column + V::LANES <= self.n {
                self.tile::<V, ROWS, 1>(row, column);
                column += V::LANES;
            }
            while column < self.n {
                for row in row..row + ROWS {
                    self.element::<V>(row, column);
                }
                column += 1;
            }
        }
    }

    /// # Safety
    /// As for [`Block`]; the tile lies inside `c`.
    #[inline(always)]
    unsafe fn tile<V: Vector, const ROWS: usize, const WIDE: usize>(&self, row: usize, column: usize) {
        // SAFETY: the tile lies inside `c`, so the rows of `a` and columns of `b` it reads exist.
        unsafe {
            // Row pointers are worked out once and moved by wrapping steps: the loop below has no checked arithmetic in any profile.
            let a: [*const f32; ROWS] =
                std::array::from_fn(|i| self.a.wrapping_add((row + i) * self.a_stride));
            let c: [*mut f32; ROWS] =
                std::array::from_fn(|i| self.c.wrapping_add((row + i) * self.c_stride + column));
            let mut b = self.b.wrapping_add(column);
            let mut sums = [[V::splat(0.0); WIDE]; ROWS];
            if self.accumulate {
                for i in 0..ROWS {
                    for j in 0..WIDE {
                        sums[i][j] = V::load(c[i].wrapping_add(j * V::LANES));
                    }
                }
            }
            for k in 0..self.k {
                let mut right = [V::splat(0.0); WIDE];
                for j in 0..WIDE {
                    right[j] = V::load(b.wrapping_add(j * V::LANES));
                }
                for i in 0..ROWS {
                    let left = V::splat(a[i].wrapping_add(k).read());
                    for j in 0..WIDE {
                        sums[i][j] = left.mul_add(right[j], sums[i][j]);
                    }
                }
                b = b.wrapping_add(self.b_stride);
            }
            for i in 0..ROWS {
                for j in 0..WIDE {
                    sums[i][j].store(c[i].wrapping_add(j * V::LANES));
                }
            }
        }
    }

    /// # Safety
    /// As for [`Block`], with `row < m` and `column < n`.
    #[inline(always)]
    unsafe fn element<V: Vector>(&self, row: usize, column: usize) {
        // SAFETY: the element exists, so its row of `a` and column of `b` do.
        unsafe {
            let c = self.c.add(row * self.c_stride + column);
            let mut sum = if self.accumulate { *c } else { 0.0 };
            for k in 0..self.k {
                let left = *self.a.add(row * self.a_stride + k);
                sum = V::mul_add_scalar(left, *self.b.add(k * self.b_stride + column), sum);
            }
            *c = sum;
        }
    }
}
