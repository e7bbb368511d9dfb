//! Settings of the allocator.

/// Lets the allocator keep large blocks that are freed, for the whole process. A training step frees what the next one asks
/// for again; from the system such memory would come as fresh pages each time, a tenth of a step's time. Only glibc is told.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// What is asked of the system at a time, so that the heap rarely grows.
        const GROWTH: i32 = 16 << 20;
        // One arena, because blocks above 64 MiB of other arenas come from the system in any case.
        let settings =
            [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, i32::MAX), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_TOP_PAD, GROWTH)];
        for (parameter, value) in settings {
            // SAFETY: two integers; what the library does not know it refuses.
            unsafe { libc::mallopt(parameter, value) };
        }
    }
}
