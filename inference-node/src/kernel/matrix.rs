//! A weight matrix in the order the kernels read it.

/// Output columns of one panel: two AVX-512 or four AVX2 registers.
pub(super) const PANEL: usize = 32;

/// `[n, k]` weights packed into panels `[n / PANEL][k][PANEL]`, so that a multiplication walks memory forwards. The last panel
/// is padded with zeros. How panels are encoded is this type's secret; f32 is the only encoding so far.
pub struct Matrix {
    rows: usize,
    columns: usize,
    panels: Panels,
}

enum Panels {
    F32(Vec<Line>),
}

/// One cache line, so that panels start on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Matrix {
    /// Packs `rows` rows; `read(row, out)` fills one row of `columns` weights.
    pub fn pack(rows: usize, columns: usize, mut read: impl FnMut(usize, &mut [f32])) -> Matrix {
        let lines_per_step = PANEL / 16;
        let mut panels = vec![Line([0.0; 16]); rows.div_ceil(PANEL) * columns * lines_per_step];
        let mut row_weights = vec![0.0; columns];
        for row in 0..rows {
            read(row, &mut row_weights);
            let (panel, lane) = (row / PANEL, row % PANEL);
            let lines =
                panels[panel * columns * lines_per_step + lane / 16..].iter_mut().step_by(lines_per_step);
            lines.zip(&row_weights).for_each(|(line, &weight)| line.0[lane % 16] = weight);
        }
        Matrix { rows, columns, panels: Panels::F32(panels) }
    }

    /// Outputs (n).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs (k).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// One weight, for the reference kernel.
    pub(super) fn weight(&self, row: usize, column: usize) -> f32 {
        let Panels::F32(lines) = &self.panels;
        let (panel, lane) = (row / PANEL, row % PANEL);
        lines[(panel * self.columns + column) * (PANEL / 16) + lane / 16].0[lane % 16]
    }

    /// Panel `index` as `[k][PANEL]`.
    pub(super) fn panel(&self, index: usize) -> &[f32] {
        let Panels::F32(lines) = &self.panels;
        let lines_per_panel = self.columns * (PANEL / 16);
        let lines = &lines[index * lines_per_panel..][..lines_per_panel];
        // SAFETY: a Line is exactly 16 f32 (repr(C), no padding: 64 bytes aligned to 64), so the slice's memory is that many f32.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast::<f32>(), lines.len() * 16) }
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }
}
