//! The fault-injecting twin of the file system, in memory.
