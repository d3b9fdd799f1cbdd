//! Writes the index out: the overlay becomes a run, small runs are merged into it, and a new manifest says so.
//!
//! # Invariants
//! - Everything that a run leads to is durable before the manifest names the run.
//! - A run is written whole, synced and given its name, and that name made durable, before the manifest names it; a
//!   replaced run is removed only after a manifest without it is durable.
//! - A segment that the manifest is not to name any more is condemned by the state of the very version that the manifest
//!   covers; it stays as it is until that manifest is durable.
//! - The accounts that a manifest names lag behind nothing: where they cannot be made to, nothing is written.
//! - One flush at a time. Commits go on beside it, into a new overlay.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use alight_format::{IndexKind, Manifest, RunId, RunRecord, SegmentId, SegmentRecord};

use crate::config::{DEAD_TAIL_BYTES, RECLAIM_PAUSE, RUN_GROWTH, RUN_GROWTH_AT_CLOSE};
use crate::error::{Error, Result};
use crate::index::{NewRun, Overlay, Run, Version, merge_count, merge_layers, write_run};
use crate::metrics::Counters;
use crate::store::core::{Core, Writer};
use crate::store::manifest;
use crate::store::segment::Segment;
use crate::store::space::{self, Held};
use crate::trace::scope;

/// Why the index is written out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// Enough has gathered in memory.
    Full,
    /// Space is to be given back.
    Space,
    /// Recovery cut something: there is a new manifest even if nothing in it is new but its generation.
    Recovered,
    /// The store is being closed.
    Closing,
}

impl Core {
    /// [`flush`](Core::flush), with its outcome in the metrics and told to whoever waits for it.
    pub(crate) fn flush_counted(&self, occasion: Occasion) -> Result<()> {
        let outcome = self.flush(occasion);
        if outcome.is_ok()
            && let Err(error) = self.reclaim()
        {
            tracing::warn!(%error, "space could not be given back; it is tried again");
        }
        let writer = self.writer()?;
        let mut wanted = writer.wanted.lock();
        wanted.flushes += 1;
        match &outcome {
            Ok(()) => {
                Counters::add(&self.counters.index_flushes, 1);
                wanted.last_failure = None;
            }
            Err(error) => {
                tracing::warn!(%error, "the index could not be written out; it stays in memory");
                Counters::add(&self.counters.index_flush_failures, 1);
                wanted.last_failure = Some(error.to_string());
            }
        }
        writer.signal.notify_all();
        outcome
    }

    /// Writes out everything that is visible now. On a failure nothing is lost: what was to be written is in memory
    /// again, and the old manifest stands.
    pub(crate) fn flush(&self, occasion: Occasion) -> Result<()> {
        let writer = self.writer()?;
        let _scope = scope!("flush", ?occasion, keys = self.version().overlay.len());
        let mut manifest = writer.manifest.lock();
        writer.committer.check()?;
        let mut condemned = BTreeSet::new();
        let (frozen, mut next) = self.change_version(|version| {
            debug_assert!(version.frozen.is_empty(), "one flush at a time");
            // What these keys led to is told by the runs as they are.
            self.count_late_in(version)?;
            version.frozen = std::mem::take(&mut version.overlay);
            // No commit is published meanwhile, so the segments' ends are those of this very version.
            let (mut segments, next_segment) = self.segments.records();
            condemned = self.condemned(&segments);
            segments.retain(|record| !condemned.contains(&record.id));
            self.set_dead_step(&segments);
            let next = Manifest {
                // Out of reach of a note that a failed sync left about this generation or the next.
                generation: manifest.generation + if occasion == Occasion::Recovered { 2 } else { 1 },
                covered: version.seq,
                segments,
                next_segment,
                ..manifest.clone()
            };
            Ok::<_, Error>((version.clone(), next))
        })?;
        // Readers of the manifest that is in place may see what this one does without. So may those of one that was put in
        // place by an attempt that failed afterwards: the next one gets the same number.
        let through_generation = writer.attempted.fetch_max(next.generation, Ordering::AcqRel).max(manifest.generation);
        match self.write_out(writer, &frozen, &manifest, &mut next, occasion) {
            Ok(replaced) => {
                let obsolete: Vec<RunId> = replaced.iter().map(|run| run.id()).collect();
                *manifest = next;
                writer.committer.generation.store(manifest.generation, Ordering::Release);
                drop(replaced);
                self.remove_runs(&obsolete);
                self.note_dead(writer, &frozen, &manifest, condemned, through_generation);
                Ok(())
            }
            Err(error) => {
                if manifest::was_a_sync(&error) {
                    writer.committer.refuse(&error);
                }
                manifest.next_run = next.next_run;
                self.change_version(|version| {
                    let newer = std::mem::replace(&mut version.overlay, std::mem::take(&mut version.frozen));
                    version.overlay.insert_newer(&newer);
                });
                Err(error)
            }
        }
    }

    /// The segments that a manifest of these need not name.
    fn condemned(&self, records: &[SegmentRecord]) -> BTreeSet<SegmentId> {
        let held: Vec<Held> = records
            .iter()
            .map(|&record| {
                let segment = self.segments.get(record.id);
                let deletes_carried = segment.is_some_and(|segment| segment.deletes_carried.load(Ordering::Acquire));
                Held { record, deletes_carried }
            })
            .collect();
        space::condemn(&held)
    }

    /// Returns the runs that the new manifest no longer names.
    fn write_out(
        &self,
        writer: &Writer,
        frozen: &Version,
        current: &Manifest,
        next: &mut Manifest,
        occasion: Occasion,
    ) -> Result<Vec<Arc<Run>>> {
        writer.committer.sync_through(frozen.seq)?;
        if frozen.frozen.is_empty() {
            let unchanged = Manifest { generation: next.generation, ..current.clone() };
            if occasion == Occasion::Recovered || *next != unchanged {
                manifest::write(&*self.storage, &self.layout, next)?;
            } else {
                // The one in place says all of it.
                next.generation = current.generation;
            }
            return Ok(Vec::new());
        }
        let fresh = frozen.frozen.len() as u64;
        let growth = if occasion == Occasion::Closing { RUN_GROWTH_AT_CLOSE } else { RUN_GROWTH };
        let merged = merge_count(fresh, frozen.runs.iter().map(|run| run.entries()), growth);
        let id = next.next_run;
        // A name is used once, even when this attempt fails: a file that an earlier one left is never mistaken.
        next.next_run = RunId(id.get() + 1);
        let runs = self.prepare(id, frozen, merged, next).inspect_err(|_| self.discard_run(id))?;
        // From here on a manifest that names the run may be in place, even if this fails.
        manifest::install(&*self.storage, &self.layout)?;
        self.change_version(|version| {
            version.frozen = Overlay::default();
            version.runs = runs.into();
        });
        Ok(frozen.runs[..merged].to_vec())
    }

    /// Writes the run and the manifest that names it, and puts neither in the place of anything. Returns the runs of the
    /// next version.
    fn prepare(&self, id: RunId, frozen: &Version, merged: usize, next: &mut Manifest) -> Result<Vec<Arc<Run>>> {
        let written = self.write_merged(id, frozen, merged)?;
        let mut records: Vec<RunRecord> = written.iter().cloned().collect();
        records.extend(next.runs.drain(..).skip(merged));
        next.runs = records;
        let mut runs = Vec::with_capacity(next.runs.len());
        if let Some(record) = &written {
            runs.push(Arc::new(Run::open(&*self.storage, &self.layout.run(id), next.store, record)?));
        }
        runs.extend(frozen.runs[merged..].iter().cloned());
        manifest::stage(&*self.storage, &self.layout, next)?;
        Ok(runs)
    }

    /// Takes away what an attempt left that no manifest names: on a full disk, each further attempt would leave as much.
    fn discard_run(&self, id: RunId) {
        for path in [self.layout.run_new(id), self.layout.run(id)] {
            match self.storage.remove(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "an unfinished index run could not be removed");
                }
                _ => {}
            }
        }
    }

    /// Writes the frozen overlay and the newest runs as one run; `None` when nothing is left of them.
    fn write_merged(&self, id: RunId, frozen: &Version, merged: usize) -> Result<Option<RunRecord>> {
        let runs = &frozen.runs[..merged];
        // A delete has done its work once nothing older is left below it.
        let keep_deletes = merged < frozen.runs.len();
        let expected = frozen.frozen.len() as u64 + runs.iter().map(|run| run.entries()).sum::<u64>();
        let overlays = [&frozen.frozen];
        let layers = merge_layers(&overlays, runs, Bound::Unbounded)?;
        let entries =
            layers.filter(|entry| entry.as_ref().map_or(true, |entry| keep_deletes || entry.kind == IndexKind::Put));
        let new = NewRun {
            store: self.segments.store(),
            id,
            unfinished: &self.layout.run_new(id),
            path: &self.layout.run(id),
            directory: &self.layout.index(),
        };
        write_run(&*self.storage, &new, expected, entries)
    }

    /// Removes the files of runs that no manifest names. What cannot be removed now goes at the next open.
    fn remove_runs(&self, ids: &[RunId]) {
        let ids: HashSet<RunId> = ids.iter().copied().collect();
        for id in ids {
            let path = self.layout.run(id);
            if let Err(error) = self.storage.remove(&path) {
                tracing::warn!(path = %path.display(), %error, "a replaced index run could not be removed");
            }
        }
    }

    /// Waits for wishes and fulfils them, until told to stop.
    pub(crate) fn maintenance_loop(self: &Arc<Self>) {
        let Ok(writer) = self.writer() else { return };
        // However it ends, whoever closes the store learns of it.
        let _ended = Ended(writer);
        let _steps = self.watched.enter();
        loop {
            let flush = {
                let mut wanted = writer.wanted.lock();
                if !wanted.flush && !wanted.shutdown {
                    if writer.reclaim.try_lock().is_some_and(|reclaim| reclaim.is_empty()) {
                        writer.signal.wait(&mut wanted);
                    } else {
                        // What waits for a snapshot or a reader is looked at again.
                        writer.signal.wait_for(&mut wanted, RECLAIM_PAUSE);
                    }
                }
                if wanted.shutdown {
                    return;
                }
                std::mem::take(&mut wanted.flush)
            };
            if !flush {
                // Told by `stat`.
                let _ = self.reclaim();
                continue;
            }
            if self.much_died() {
                writer.committer.seal_tails(is_mostly_dead);
            }
            // Its outcome is counted and told there.
            if self.flush_counted(Occasion::Full).is_ok() {
                self.compact_in_background();
            }
        }
    }
}

/// Tells the end of the maintenance thread.
struct Ended<'w>(&'w Writer);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.wanted.lock().ended = true;
        self.0.signal.notify_all();
    }
}

/// Whether a segment that is still written to is better ended, so that what died in it can be given back.
fn is_mostly_dead(segment: &Segment) -> bool {
    let accounting = *segment.accounting.lock();
    let dead = accounting.blob_bytes - accounting.live_bytes;
    dead >= DEAD_TAIL_BYTES && dead >= accounting.blob_bytes / 4
}
