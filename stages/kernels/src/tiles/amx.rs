//! AMX tiles. The assembler is used because the intrinsics are not in stable Rust.

use std::{
    arch::{
        asm,
        x86_64::{__cpuid, __cpuid_count, _xgetbv},
    },
    marker::PhantomData,
    sync::OnceLock,
};

use super::{BLOCK, Into, PANEL};

/// Whether processor and system have tiles with bfloat16, and this process may use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_tiles() && may_use_tiles())
}

fn has_tiles() -> bool {
    if __cpuid(0).eax < 7 {
        return false;
    }
    let (bfloat16, tiles, xsave) = (1 << 22, 1 << 24, 1 << 27);
    let extended = __cpuid_count(7, 0).edx;
    if __cpuid(1).ecx & xsave == 0 || extended & bfloat16 == 0 || extended & tiles == 0 {
        return false;
    }
    // SAFETY: the system has switched XSAVE on (the bit tested above says so).
    let enabled = unsafe { xcr0() };
    enabled & (3 << 17) == 3 << 17
}

#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller has tested for XSAVE.
    unsafe { _xgetbv(0) }
}

/// Linux gives a process the tiles' state only when it asks (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`).
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    let result: i64;
    // SAFETY: a system call with two integers; it touches no memory of ours.
    unsafe {
        asm!("syscall", inlateout("rax") 158_i64 => result, in("rdi") 0x1023, in("rsi") 18, out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// Configured tiles of the calling thread; released when dropped.
pub(super) struct Tiles(PhantomData<*const ()>);

#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// Eight tiles of 16 rows of 64 bytes. [`is_available`] must have said yes.
    pub(super) fn configure() -> Self {
        assert!(is_available());
        let (mut bytes_per_row, mut rows) = ([0; 16], [0; 16]);
        bytes_per_row[..8].fill(64);
        rows[..8].fill(16);
        let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row, rows };
        // SAFETY: the processor has tiles and the process may use them; 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as in `configure`. Back to the initial state, so that a thread switch need not save tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// A panel of rows by a panel of columns; half a panel from `next` on is fetched meanwhile. The thread must have [`Tiles`].
///
/// Where another thread shares the core, loads of tiles and products do not overlap. So what comes from the second-level cache
/// is fetched into the first before it is loaded, and loads stand together.
pub(super) fn panel(left: &[u16], right: &[u16], next: *const u16, out: &mut [f32], out_row_stride: usize, into: Into) {
    begin(out, out_row_stride, into);
    let blocks = left.len() / BLOCK;
    assert!(left.len() == right.len() && left.len() == blocks * BLOCK && blocks > 0);
    // SAFETY: each round reads two tiles (2,048 bytes) from each side, `blocks` times, which the assertion bounds; fetching ahead
    // never fails, wherever.
    // Tiles are configured, as the caller promises; no other code uses them.
    unsafe {
        asm!(
            "2:",
            "tileloadd tmm4, [{left} + {row}*1]",
            "tileloadd tmm6, [{right} + {row}*1]",
            "tileloadd tmm7, [{right} + {row}*1 + 1024]",
            "tileloadd tmm5, [{left} + {row}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "prefetcht0 [{next}]",
            "prefetcht0 [{next} + 64]",
            "prefetcht0 [{next} + 128]",
            "prefetcht0 [{next} + 192]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "prefetcht0 [{next} + 256]",
            "prefetcht0 [{next} + 320]",
            "prefetcht0 [{next} + 384]",
            "prefetcht0 [{next} + 448]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "prefetcht0 [{next} + 512]",
            "prefetcht0 [{next} + 576]",
            "prefetcht0 [{next} + 640]",
            "prefetcht0 [{next} + 704]",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetcht0 [{next} + 768]",
            "prefetcht0 [{next} + 832]",
            "prefetcht0 [{next} + 896]",
            "prefetcht0 [{next} + 960]",
            "add {left}, 2048",
            "add {right}, 2048",
            "add {next}, 1024",
            "dec {blocks}",
            "jnz 2b",
            left = inout(reg) left.as_ptr() => _,
            right = inout(reg) right.as_ptr() => _,
            next = inout(reg) next => _,
            blocks = inout(reg) blocks => _,
            row = in(reg) 64_usize,
            options(nostack),
        );
    }
    end(out, out_row_stride);
}

/// Sums begin with zero or with what they are added to.
fn begin(out: &[f32], row_stride: usize, into: Into) {
    assert!((PANEL - 1) * row_stride + PANEL <= out.len());
    // SAFETY: four tiles of 16 rows of 16 numbers, within `out` by the assertion.
    unsafe {
        match into {
            Into::Overwrite => asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem)),
            Into::Add => asm!(
                "tileloadd tmm0, [{upper} + {row}*1]",
                "tileloadd tmm1, [{upper} + {row}*1 + 64]",
                "tileloadd tmm2, [{lower} + {row}*1]",
                "tileloadd tmm3, [{lower} + {row}*1 + 64]",
                upper = in(reg) out.as_ptr(),
                lower = in(reg) out.as_ptr().add(PANEL / 2 * row_stride),
                row = in(reg) 4 * row_stride,
                options(nostack, readonly),
            ),
        }
    }
}

fn end(out: &mut [f32], row_stride: usize) {
    assert!((PANEL - 1) * row_stride + PANEL <= out.len());
    // SAFETY: as in `begin`.
    unsafe {
        asm!(
            "tilestored [{upper} + {row}*1], tmm0",
            "tilestored [{upper} + {row}*1 + 64], tmm1",
            "tilestored [{lower} + {row}*1], tmm2",
            "tilestored [{lower} + {row}*1 + 64], tmm3",
            upper = in(reg) out.as_mut_ptr(),
            lower = in(reg) out.as_mut_ptr().add(PANEL / 2 * row_stride),
            row = in(reg) 4 * row_stride,
            options(nostack),
        );
    }
}
