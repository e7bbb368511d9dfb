//! What is used of MPI: point-to-point messages of bytes that are asked for and waited for apart, so that a wait can end when a
//! process is gone. Calls are made one at a time, from any thread.

use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mpi::ffi;
use rlflow_api::Message;

/// The longest message that MPI is given; what is longer goes in pieces. A piece of this length has another one behind it.
const PIECE_BYTES: usize = 1 << 30;

/// A message is on its way out.
pub struct Sending {
    request: ffi::MPI_Request,
    /// MPI reads it until the request is done; what is dropped before is left to MPI.
    message: Option<Arc<Message>>,
}

impl Drop for Sending {
    fn drop(&mut self) {
        std::mem::forget(self.message.take());
    }
}

/// A message, or a piece of one, is on its way in.
pub struct Receiving {
    request: ffi::MPI_Request,
    /// MPI writes to it until the request is done; what is dropped before is left to MPI.
    piece: Option<Message>,
}

impl Drop for Receiving {
    fn drop(&mut self) {
        std::mem::forget(self.piece.take());
    }
}

// SAFETY: a request is a handle; MPI is initialised for calls from any thread, one at a time, and `Calls` makes them so.
unsafe impl Send for Sending {}
// SAFETY: as above.
unsafe impl Send for Receiving {}

/// Guards MPI. No call is made after it was closed.
#[derive(Debug)]
pub struct Calls(Mutex<bool>);

/// What MPI says went wrong.
fn checked(what: &str, code: c_int) -> Result<(), String> {
    if code == ffi::MPI_SUCCESS as c_int { Ok(()) } else { Err(format!("MPI cannot {what} (error {code})")) }
}

impl Calls {
    /// MPI is initialised, and stays so until [`Calls::close`].
    pub fn new() -> Self {
        let calls = Self(Mutex::new(false));
        // Else MPI ends the process on any error.
        // SAFETY: the world communicator and the handler exist while MPI is initialised.
        unsafe { ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) };
        calls
    }

    fn open(&self) -> Result<MutexGuard<'_, bool>, String> {
        let closed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *closed { Err("this process has left the others".into()) } else { Ok(closed) }
    }

    /// Makes no further call.
    pub fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Starts to send a message, in pieces if it is long.
    pub fn send(&self, to: usize, tag: c_int, message: &Arc<Message>) -> Result<Vec<Sending>, String> {
        let bytes = message.bytes();
        let mut started = Vec::with_capacity(1);
        for start in (0..=bytes.len()).step_by(PIECE_BYTES) {
            let piece = &bytes[start..bytes.len().min(start + PIECE_BYTES)];
            let mut request = MaybeUninit::uninit();
            let guard = self.open()?;
            // SAFETY: the piece stays where it is, unchanged, until the request is done: `Sending` holds its message, and leaks it
            // rather than let go of it before.
            let code = unsafe {
                let buffer = piece.as_ptr().cast::<c_void>();
                let (kind, world) = (ffi::RSMPI_UINT8_T, ffi::RSMPI_COMM_WORLD);
                ffi::MPI_Isend(buffer, piece.len() as c_int, kind, to as c_int, tag, world, request.as_mut_ptr())
            };
            drop(guard);
            checked("send", code)?;
            // SAFETY: the call succeeded.
            started.push(Sending { request: unsafe { request.assume_init() }, message: Some(message.clone()) });
        }
        Ok(started)
    }

    /// Whether it was sent.
    pub fn is_sent(&self, sending: &mut Sending) -> Result<bool, String> {
        let done = self.test(&mut sending.request)?;
        if done {
            sending.message = None;
        }
        Ok(done)
    }

    /// Starts to receive a message, or a piece, if one has come.
    pub fn receive(&self, from: usize, tag: c_int) -> Result<Option<Receiving>, String> {
        let (mut flag, mut count) = (0, 0);
        let (mut handle, mut status, mut request) = (MaybeUninit::uninit(), MaybeUninit::uninit(), MaybeUninit::uninit());
        let guard = self.open()?;
        // SAFETY: all out-pointers are valid; what they point to is read only where the calls have set it.
        unsafe {
            let world = ffi::RSMPI_COMM_WORLD;
            checked("look for messages", ffi::MPI_Improbe(from as c_int, tag, world, &mut flag, handle.as_mut_ptr(), status.as_mut_ptr()))?;
            if flag == 0 {
                return Ok(None);
            }
            checked("measure a message", ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut count))?;
            let mut piece = Message::zeroed(count.max(0) as usize);
            let buffer = piece.bytes_mut().as_mut_ptr().cast::<c_void>();
            let code = ffi::MPI_Imrecv(buffer, count, ffi::RSMPI_UINT8_T, handle.as_mut_ptr(), request.as_mut_ptr());
            drop(guard);
            checked("receive", code)?;
            Ok(Some(Receiving { request: request.assume_init(), piece: Some(piece) }))
        }
    }

    /// What was received, once all of it was.
    pub fn received(&self, receiving: &mut Receiving) -> Result<Option<Message>, String> {
        let done = self.test(&mut receiving.request)?;
        Ok(if done { receiving.piece.take() } else { None })
    }

    fn test(&self, request: &mut ffi::MPI_Request) -> Result<bool, String> {
        let mut flag = 0;
        let _guard = self.open()?;
        // SAFETY: the request is one that MPI gave, and null once it is done, which is tested likewise.
        let code = unsafe { ffi::MPI_Test(ptr::from_mut(request), &mut flag, ffi::RSMPI_STATUS_IGNORE) };
        checked("test a message", code)?;
        Ok(flag != 0)
    }

    /// Ends all processes, this one too, without waiting for any.
    pub fn abort(&self) {
        // SAFETY: MPI is initialised: whoever finalises it does so instead.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, 1) };
    }
}

/// Whether another piece of the same message follows.
pub fn is_continued(piece: &Message) -> bool {
    piece.bytes().len() == PIECE_BYTES
}
