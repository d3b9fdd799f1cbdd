//! What cuFile answers when it refuses: a number, told in words, with the remedy where one is known. A number that nobody
//! knows stays one.

use std::fmt;
use std::io;
use std::time::Duration;

use super::sys::RawError;

/// The result of every call of this module that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of cuFile: what was being done, on what, why it failed, and the remedy where one is known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    action: &'static str,
    subject: String,
    kind: ErrorKind,
    remedy: Option<String>,
}

/// Why a call of cuFile failed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// cuFile cannot be used in this process: why.
    Unavailable(String),
    /// cuFile's own answer.
    Status {
        /// Its code.
        status: Status,
        /// CUDA's `CUresult`, where that is what failed.
        cuda: Option<i32>,
    },
    /// The system's answer: an `errno`.
    Os(i32),
    /// The file ended before the bytes that were promised.
    EndOfFile {
        /// The bytes that were asked for.
        wanted: u64,
        /// The bytes that there were.
        got: u64,
    },
    /// Something was not done in time. What it uses is kept, since cuFile may still use it too.
    TimedOut(Duration),
    /// The operation was cancelled.
    Canceled,
    /// The call was wrong: how. Nothing was done.
    Invalid(String),
    /// The device failed: what it said.
    Device(String),
}

macro_rules! statuses {
    ($( $code:literal $name:ident $text:literal, )*) => {
        /// A code of cuFile (`CUfileOpError`).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Status {
            $( #[doc = concat!($code, ": ", $text, ".")] $name, )*
            /// A code that this version of alight does not know.
            Unknown(i32),
        }

        impl Status {
            /// The status with this code.
            pub fn from_code(code: i32) -> Status {
                match code {
                    $( $code => Status::$name, )*
                    code => Status::Unknown(code),
                }
            }

            /// The code of this status.
            pub fn code(self) -> i32 {
                match self {
                    $( Status::$name => $code, )*
                    Status::Unknown(code) => code,
                }
            }

            fn text(self) -> &'static str {
                match self {
                    $( Status::$name => $text, )*
                    Status::Unknown(_) => "unknown to this version",
                }
            }
        }

        #[cfg(test)]
        const KNOWN: &[i32] = &[$( $code, )*];
    };
}

statuses! {
    5001 DriverNotInitialized "the driver is not initialised",
    5002 DriverInvalidProps "invalid property",
    5003 DriverUnsupportedLimit "property out of range",
    5004 DriverVersionMismatch "nvidia-fs is of another version",
    5005 DriverVersionReadError "nvidia-fs's version could not be read",
    5006 DriverClosing "the driver is closing",
    5007 PlatformNotSupported "cuFile is not supported on this platform",
    5008 IoNotSupported "I/O is not supported on this file",
    5009 DeviceNotSupported "GPUDirect Storage is not supported on this GPU",
    5010 NvfsDriverError "the nvidia-fs driver failed",
    5011 CudaDriverError "the CUDA driver failed",
    5012 CudaPointerInvalid "not an address of device memory",
    5013 CudaMemoryTypeInvalid "not memory of a kind that cuFile takes",
    5014 CudaPointerRangeError "the range reaches past its allocation",
    5015 CudaContextMismatch "the memory belongs to another CUDA context",
    5016 InvalidMappingSize "the mapping is larger than it may be",
    5017 InvalidMappingRange "the mapping reaches past its memory",
    5018 InvalidFileType "not a file of a kind that cuFile takes",
    5019 InvalidFileOpenFlag "the file was opened with a flag that cuFile does not take",
    5020 DioNotSet "the file was not opened with O_DIRECT",
    5022 InvalidValue "invalid argument",
    5023 MemoryAlreadyRegistered "the memory is registered already",
    5024 MemoryNotRegistered "the memory is not registered",
    5025 PermissionDenied "permission denied",
    5026 DriverAlreadyOpen "the driver is open already",
    5027 HandleNotRegistered "the file is not registered, or cannot be",
    5028 HandleAlreadyRegistered "the file is registered already",
    5029 DeviceNotFound "the device was not found",
    5030 InternalError "internal error",
    5031 GetNewFdFailed "no new descriptor could be had",
    5033 NvfsSetupError "the driver could not be set up",
    5034 IoDisabled "I/O is disabled by cuFile's configuration",
    5035 BatchSubmitFailed "the batch was not accepted",
    5036 GpuMemoryPinningFailed "device memory could not be pinned",
    5037 BatchFull "the batch is full",
    5038 AsyncNotSupported "operations on streams are not supported",
    5039 InternalBatchSetupError "a batch could not be set up",
    5040 InternalBatchSubmitError "a batch could not be submitted",
    5041 InternalBatchGetStatusError "a batch's status could not be had",
    5042 InternalBatchCancelError "a batch could not be cancelled",
    5043 NoMemory "cuFile is out of memory",
    5044 IoError "the I/O failed",
    5045 InternalBufRegisterError "device memory could not be registered",
    5046 HashError "cuFile lost track of an object",
    5047 InvalidContext "no CUDA context, or an invalid one",
    5048 NvfsInternalDriverError "the nvidia-fs driver failed inside",
    5049 BatchNoCompat "batches need compatibility mode, which is off",
}

impl Status {
    /// Whether the same call may succeed a little later.
    pub fn is_transient(self) -> bool {
        matches!(self, Status::InternalBatchCancelError | Status::NoMemory | Status::BatchFull)
    }

    fn remedy(self) -> Option<&'static str> {
        Some(match self {
            Status::DriverVersionMismatch | Status::DriverVersionReadError => {
                "install nvidia-fs of the same CUDA release as libcufile, and load it again"
            }
            Status::IoNotSupported | Status::DioNotSet => {
                "the file's file system has no direct path: allow compatibility mode, or use another transport"
            }
            Status::GpuMemoryPinningFailed | Status::InternalBufRegisterError => {
                "BAR1 memory is used up (nvidia-smi -q -d MEMORY): register less, or transfer without registering"
            }
            Status::IoDisabled => "see properties.allow_compat_mode in cufile.json",
            Status::BatchFull => "wait for operations to complete, or set up a larger batch",
            Status::NvfsSetupError => "cuFile's log says why",
            _ => return None,
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuFile error {}: {}", self.code(), self.text())
    }
}

impl Error {
    pub(super) fn new(action: &'static str, subject: impl Into<String>, kind: ErrorKind) -> Error {
        let remedy = match &kind {
            ErrorKind::Status { status, .. } => status.remedy().map(str::to_string),
            _ => None,
        };
        Error { action, subject: subject.into(), kind, remedy }
    }

    /// The same with another remedy.
    pub(super) fn with_remedy(mut self, remedy: Option<String>) -> Error {
        self.remedy = remedy.or(self.remedy);
        self
    }

    /// What was being done.
    pub fn action(&self) -> &'static str {
        self.action
    }

    /// On what: a file, or a device.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Why it failed.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// What the caller can do, where it is known.
    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    /// cuFile's code, where that is what failed.
    pub fn status(&self) -> Option<Status> {
        match self.kind {
            ErrorKind::Status { status, .. } => Some(status),
            _ => None,
        }
    }

    /// Whether the file ended before the bytes that were promised.
    pub fn is_end_of_file(&self) -> bool {
        matches!(self.kind, ErrorKind::EndOfFile { .. })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} with cuFile: {}", self.action, self.subject, self.kind)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ErrorKind::Unavailable(why) | ErrorKind::Invalid(why) | ErrorKind::Device(why) => f.write_str(why),
            ErrorKind::Status { status, cuda: None } => status.fmt(f),
            ErrorKind::Status { status, cuda: Some(code) } => write!(f, "{status} (CUDA error {code})"),
            ErrorKind::Os(errno) => io::Error::from_raw_os_error(*errno).fmt(f),
            ErrorKind::EndOfFile { wanted, got } => write!(f, "the file ended after {got} of {wanted} bytes"),
            ErrorKind::TimedOut(time) => write!(f, "not done within {time:?}"),
            ErrorKind::Canceled => f.write_str("cancelled"),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match error.kind {
            ErrorKind::Unavailable(_) => io::ErrorKind::Unsupported,
            ErrorKind::Os(errno) => io::Error::from_raw_os_error(errno).kind(),
            ErrorKind::EndOfFile { .. } => io::ErrorKind::UnexpectedEof,
            ErrorKind::TimedOut(_) => io::ErrorKind::TimedOut,
            ErrorKind::Invalid(_) => io::ErrorKind::InvalidInput,
            ErrorKind::Status { .. } | ErrorKind::Canceled | ErrorKind::Device(_) => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// Success, or why not.
pub(super) fn check(raw: RawError) -> std::result::Result<(), ErrorKind> {
    match (raw.err, Status::from_code(raw.err)) {
        (0, _) => Ok(()),
        (_, status @ Status::CudaDriverError) => Err(ErrorKind::Status { status, cuda: Some(raw.cu_err) }),
        (_, status) => Err(ErrorKind::Status { status, cuda: None }),
    }
}

/// A count of bytes, or why there is none: -1 stands for `errno` (read by the caller right after the call), other numbers
/// below zero for a code. In a batch, a small one is an `errno` itself.
pub(super) fn check_count(count: isize, errno: i32) -> std::result::Result<u64, ErrorKind> {
    match u64::try_from(count) {
        Ok(count) => Ok(count),
        Err(_) if count == -1 => Err(ErrorKind::Os(errno)),
        Err(_) => Err(match i32::try_from(count.unsigned_abs()) {
            Ok(small) if small < 4096 => ErrorKind::Os(small),
            Ok(code) => ErrorKind::Status { status: Status::from_code(code), cuda: None },
            Err(_) => ErrorKind::Status { status: Status::Unknown(i32::MAX), cuda: None },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_and_an_unknown_one_stays_a_number() {
        for code in 5001..=5100 {
            let status = Status::from_code(code);
            assert_eq!(status.code(), code);
            assert_eq!(matches!(status, Status::Unknown(_)), !KNOWN.contains(&code), "{code}");
        }
        assert_eq!(KNOWN.len(), 47);
        assert_eq!(Status::from_code(7777).to_string(), "cuFile error 7777: unknown to this version");
    }

    #[test]
    fn an_answer_is_judged_with_both_of_its_codes() {
        assert_eq!(check(RawError { err: 0, cu_err: 999 }), Ok(()));
        let cuda = ErrorKind::Status { status: Status::CudaDriverError, cuda: Some(201) };
        assert_eq!(check(RawError { err: 5011, cu_err: 201 }), Err(cuda.clone()));
        assert!(cuda.to_string().contains("CUDA error 201"));
        let other = check(RawError { err: 5027, cu_err: 201 }).unwrap_err();
        assert_eq!(other, ErrorKind::Status { status: Status::HandleNotRegistered, cuda: None });
    }

    #[test]
    fn a_count_is_bytes_an_errno_or_a_code() {
        assert_eq!(check_count(0, 5), Ok(0));
        assert_eq!(check_count(17, 5), Ok(17));
        assert_eq!(check_count(-1, libc::ENOSPC), Err(ErrorKind::Os(libc::ENOSPC)));
        assert_eq!(check_count(-(libc::EIO as isize), 0), Err(ErrorKind::Os(libc::EIO)));
        let status = Status::CudaPointerRangeError;
        assert_eq!(check_count(-5014, 0), Err(ErrorKind::Status { status, cuda: None }));
        assert!(matches!(check_count(isize::MIN, 0), Err(ErrorKind::Status { status: Status::Unknown(_), .. })));
    }

    #[test]
    fn an_error_says_what_on_what_why_and_what_to_do() {
        let kind = ErrorKind::Status { status: Status::GpuMemoryPinningFailed, cuda: None };
        let error = Error::new("register", "memory on cuda:0", kind);
        assert_eq!(
            error.to_string(),
            "register memory on cuda:0 with cuFile: cuFile error 5036: device memory could not be pinned; BAR1 memory is \
             used up (nvidia-smi -q -d MEMORY): register less, or transfer without registering"
        );
        let end = Error::new("read", "f", ErrorKind::EndOfFile { wanted: 10, got: 3 });
        assert!(end.is_end_of_file() && end.remedy().is_none());
        assert_eq!(io::Error::from(end).kind(), io::ErrorKind::UnexpectedEof);
    }
}
