//! Every size and count that alight's own code chooses, in one place, each with its reason. Limits of the format are in
//! [`limits`](crate::limits).

use std::time::Duration;

/// A segment's length when nothing else is asked for. Large enough that a directory of terabytes stays short, small
/// enough that rewriting one is no event.
pub(crate) const SEGMENT_BYTES_DEFAULT: u64 = 256 << 20;

/// The smallest segment that may be asked for: a header and one small commit. Tests shrink segments to this.
pub(crate) const SEGMENT_BYTES_MIN: u64 = 16 << 10;

/// The largest segment that may be asked for. Offsets are 64 bits wide; this only keeps a slip of the unit from passing.
pub(crate) const SEGMENT_BYTES_MAX: u64 = 1 << 40;

/// Up to this payload a commit is one write and one sync, and recovery reads it to check it. Above, the payload is
/// synced before its frame is written, so that recovery never reads it.
pub(crate) const SMALL_COMMIT_BYTES_MAX: u64 = 1 << 20;

/// From this part of [`SMALL_COMMIT_BYTES_MAX`] on, a small commit's payload goes to the disk while it is being copied. Below,
/// copying takes no longer than waking the thread that writes.
pub(crate) const STREAMED_PART_OF_SMALL: u64 = 4;

/// How much payload one leader writes for itself and those that queue behind it.
pub(crate) const GROUP_BYTES_MAX: u64 = 8 << 20;

/// Space is taken ahead in steps of this size, so that appends change no file length.
pub(crate) const ALLOCATE_STEP_BYTES: u64 = 64 << 20;

/// Zeros are written behind small durable commits in steps of this size. A sync after a write to space that was only taken
/// makes the file system record it as written, with a commit of its journal; after an overwrite it has nothing to record: 0.15
/// instead of 0.30 ms for a 4 KiB put on a virtual disk with ext4. A step costs less than two such commits save.
pub(crate) const PREWRITE_BYTES: u64 = 1 << 20;

/// For groups of commits longer than this, writing their bytes twice would cost what it saves.
pub(crate) const PREWRITTEN_COMMITS_BYTES_MAX: u64 = 128 << 10;

/// The index overlay is written out as a run when it holds this many keys: replaying as many after a crash takes tens
/// of milliseconds, and they take about 5 MiB of memory.
pub(crate) const OVERLAY_ENTRIES_MAX: usize = 16 * 1024;

/// The filter in front of the overlay: 32 bits a key, and so 64 KiB, which stay in a processor's own cache. While the
/// overlay is no fuller than that, fewer than one absent key in a hundred is looked up in vain.
pub(crate) const OVERLAY_FILTER_BYTES: usize = 4 * OVERLAY_ENTRIES_MAX;

/// A run is merged with its newer neighbours while it has fewer than this many times their entries, so the number of
/// runs grows with the logarithm of the number of keys.
pub(crate) const RUN_GROWTH: u64 = 4;

/// The same at close, when nobody waits for a commit: a store that is opened again has one run, unless the newer ones
/// hold less than this part of it. Closing after few changes stays cheap.
pub(crate) const RUN_GROWTH_AT_CLOSE: u64 = 64;

/// Commits wait for the overlay to be written out once it holds this many times its limit, and are refused if it cannot
/// be: memory stays bounded.
pub(crate) const OVERLAY_BACKLOG_FACTOR: usize = 4;

/// Segment files kept open for reading. A process has 1024 descriptors by default, and a file may take two.
pub(crate) const OPEN_SEGMENTS_MAX: usize = 256;

/// One buffer of those that carry a large commit to the disk. Direct writes of four megabytes reach the disk's rate.
pub(crate) const WRITE_BUFFER_BYTES: usize = 4 << 20;

/// The first write of a large commit: while its bytes are copied and checked the disk has nothing to do, a twentieth of the time
/// that 16 MiB take where that were a whole buffer.
pub(crate) const FIRST_WRITE_BYTES: u64 = 512 << 10;

/// Each further one is up to so many times as long as the one before: bytes are copied and checked four times as fast as a fast
/// virtual disk takes them.
pub(crate) const WRITE_GROWTH: u64 = 4;

/// How many such buffers a large commit has in hand, one of them being filled: on a fast virtual disk two writes in flight
/// gave 0.85 of what eight did.
pub(crate) const WRITE_BUFFERS: usize = 8;

/// Threads that read for one `get_many`, the caller's own included.
pub(crate) const READ_THREADS_MAX: usize = 16;

/// Threads that read what is not in the page cache, where reads are long: a virtual disk gave fourteen of them 1.8 GB/s, eight 1.9,
/// and six 2.1; and 6 MiB on their way are more than a fast disk answers for in its own time.
pub(crate) const DIRECT_READ_THREADS_MAX: usize = 6;

/// From this length on a read is long: below, a disk needs many at a time.
pub(crate) const LONG_READ_BYTES: usize = 256 << 10;

/// One read: large enough for the disk's full rate, small enough that a ring of them stays in the last-level cache while
/// it is checked and copied on.
pub(crate) const READ_BYTES: usize = 1 << 20;

/// A value of about one read is read in two parts, one behind the other, as fast as in one: the first, this part of it, is checked
/// while the second is on its way. Checking 1 MiB takes some 60 µs, an eighth of it has come by then, and nothing hides the check
/// of the second: seven eighths were faster than any other part (by 15 % than five).
pub(crate) const READ_FIRST_PART: (u64, u64) = (7, 8);

/// How long a read may go without any progress: far longer than any healthy disk takes for a mebibyte.
pub(crate) const READ_DEADLINE: Duration = Duration::from_secs(60);

/// How long a write or a sync may. A commit that is given up costs the store its writes, so this is longer than Linux takes
/// to give a request up itself: 30 s, and five more tries with SCSI.
pub(crate) const WRITE_DEADLINE: Duration = Duration::from_secs(200);

/// Windows of [`READ_BYTES`] between the thread that reads a large value and the caller whom it is handed to, one of them in
/// the caller's hands.
pub(crate) const HANDED_WINDOWS: usize = 4;

/// So much at most is brought to the host by the caller's own thread alone where it is in the page cache: starting others took 60 µs,
/// reading two values of 4 KiB five, and 256 KiB of them as long as with others.
pub(crate) const CACHED_ALONE_BYTES_MAX: u64 = 128 << 10;

/// What is read in order from this length on is read ahead by another thread, and several values
/// together are brought by threads of the store's own: for less, handing them over (6 µs) would show.
pub(crate) const WATCHED_BYTES_MIN: u64 = 4 << 20;

/// What is shorter and in the page cache is read from there, and not fetched ahead: reading 64 KiB took half as long as copying
/// them out of a slot and having the GPU take their checksum.
pub(crate) const PREFETCHED_CACHED_BYTES_MIN: u64 = 256 << 10;

/// What a stream reads ahead when nothing else is asked for: four windows that each go at a large read's rate.
pub(crate) const STREAM_LOOKAHEAD_BYTES: u64 = 128 << 20;

/// In how many windows a stream's lookahead is read: one is being handed out and one being read, and there is one to spare on
/// either side.
pub(crate) const STREAM_WINDOWS: usize = 4;

/// How many keys a stream's window has at most, so that tiny values take bounded host memory too: some 4 MiB a window.
pub(crate) const STREAM_KEYS_MAX: usize = 16 * 1024;

/// How often a reader beside a live writer starts over when files that it was about to open were replaced meanwhile.
pub(crate) const OPEN_ATTEMPTS: usize = 16;

/// How long a commit waits for the background flush of the index before it is refused.
pub(crate) const FLUSH_PATIENCE: Duration = Duration::from_secs(120);

/// The shortest hole that is punched. A shorter one is left to compaction: each costs a call and an extent of the file
/// system's own bookkeeping.
pub(crate) const HOLE_BYTES_MIN: u64 = 16 << 10;

/// How many holes may wait to be punched, about; what is beyond is found again later. 16 bytes each.
pub(crate) const HOLES_MAX: usize = 1 << 20;

/// Space is given back once this much died, or an eighth of what lives, whichever is more, however few keys that were.
pub(crate) const DEAD_BYTES_STEP: u64 = 32 << 20;

/// A segment that is still written to is ended early once this much of it is dead, and a quarter.
pub(crate) const DEAD_TAIL_BYTES: u64 = 16 << 20;

/// How much compaction copies with one commit, at most. Nobody waits for it but the store's close.
pub(crate) const COMPACTION_BATCH_BYTES: u64 = 32 << 20;

/// How many entries it repeats with one commit, and the bytes of their keys and attributes, at most.
pub(crate) const COMPACTION_BATCH_ENTRIES: usize = 4096;

/// See [`COMPACTION_BATCH_ENTRIES`].
pub(crate) const COMPACTION_BATCH_ENTRY_BYTES: usize = 4 << 20;

/// Less than this is never worth a rewrite: the header and the frame of the copy take two blocks themselves.
pub(crate) const WASTE_BYTES_MIN: u64 = 16 << 10;

/// `Store::compact` rewrites a segment that wastes this many percent of what it takes.
pub(crate) const COMPACTION_PERCENT: u64 = 10;

/// In the background, segments are rewritten while all of them together take this many percent more than what lives.
pub(crate) const BACKGROUND_EXCESS_PERCENT: u64 = 25;

/// And this much more: in a small store the copies would cost more than they give back.
pub(crate) const BACKGROUND_SLACK_BYTES: u64 = 64 << 20;

/// And then those that waste this many percent.
pub(crate) const BACKGROUND_PERCENT: u64 = 20;

/// How fast compaction copies in the background when nothing else is asked for: a fraction of what a disk does, so that
/// reads beside it hardly notice.
pub(crate) const BACKGROUND_BYTES_PER_SECOND: u64 = 128 << 20;

/// Of how many keys it is remembered that they were read, where what is read stays longest. 8 bytes each, and as many again.
pub(crate) const TOUCHED_KEYS_MAX: usize = 1 << 20;

/// How often the background looks whether what waits to be given back is still seen.
pub(crate) const RECLAIM_PAUSE: Duration = Duration::from_secs(1);
