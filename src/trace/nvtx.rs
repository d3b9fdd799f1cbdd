//! Ranges for NVIDIA's profilers (Nsight Systems): NVTX's library, found at run time. Where there is none nothing happens.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::mem;
use std::sync::OnceLock;

/// The library of NVTX 2, which NVTX 3 ships on, and the one that holds NVTX 3's functions for callers that are not C.
const NAMES: [&CStr; 4] = [c"libnvToolsExt.so.1", c"libnvToolsExt.so", c"libnvtx3interop.so.1", c"libnvtx3interop.so"];

/// The two functions of its C interface that are used: both count the ranges of the calling thread.
#[derive(Clone, Copy)]
struct Functions {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

/// A range on this thread, from its making to its drop. Ranges of one thread nest.
pub(super) struct Range {
    pop: Option<unsafe extern "C" fn() -> c_int>,
    /// It ends on the thread that it began on.
    _of_this_thread: PhantomData<*const ()>,
}

impl Range {
    /// Begins a range; the name ends with a zero, and is cut at the first.
    pub(super) fn push(name: &'static str) -> Range {
        let functions = CStr::from_bytes_until_nul(name.as_bytes()).ok().zip(functions());
        let pop = functions.map(|(name, functions)| {
            // SAFETY: the function was found under its name, and the text ends with a zero and lives for ever.
            unsafe { (functions.push)(name.as_ptr()) };
            functions.pop
        });
        Range { pop, _of_this_thread: PhantomData }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(pop) = self.pop {
            // SAFETY: the function was found under its name; a range was pushed on this thread, since a range is not sent.
            unsafe { pop() };
        }
    }
}

/// The library's functions, looked for once.
fn functions() -> Option<Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    *FUNCTIONS.get_or_init(|| NAMES.iter().find_map(|name| load(name)))
}

fn load(name: &CStr) -> Option<Functions> {
    // SAFETY: the name ends with a zero. The library's initialisers run, as any use of it means; it is never unloaded.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    let find = |symbol: &CStr| {
        // SAFETY: the library is loaded and stays so; the name ends with a zero.
        let found = unsafe { libc::dlsym(library, symbol.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    if library.is_null() {
        return None;
    }
    let (push, pop) = (find(c"nvtxRangePushA")?, find(c"nvtxRangePop")?);
    // SAFETY: `nvToolsExt.h` gives these functions these types.
    Some(unsafe {
        Functions {
            push: mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_int>(push),
            pop: mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(pop),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_nest_whether_there_is_a_library_or_not() {
        assert!(load(c"libnvtx-of-nowhere.so").is_none() && load(c"libc.so.6").is_none());
        let outer = Range::push("outer\0");
        let inner = Range::push("inner\0");
        assert_eq!(outer.pop.is_some(), functions().is_some());
        drop((inner, outer));
        assert!(Range::push("no zero").pop.is_none());
    }
}
