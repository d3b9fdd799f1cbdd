//! The ring of host slots that transfers go through: page-aligned, pinned where the device is a GPU, and bounded. It moves
//! no bytes, and never grows: when every slot is in use, the next caller waits.
//!
//! A slot is free, held by a caller, or busy: handed to the hardware, until its event has passed. Nobody watches busy
//! slots; the next caller that needs one asks the one that has been busy longest, and waits for it if nothing is free. A
//! slot that has just become idle is taken before one that was never used: it is still in the processor's cache.
//!
//! # Invariants
//! - Free, held, busy and lost slots together are the ring.
//! - A busy slot is touched by nobody until its event has passed.
//! - A slot whose hardware cannot be waited for is lost: its memory is never used or unmapped again, and the ring then
//!   answers every call with that error. The driver says so only when the process has lost the GPU.
//!
//! # Deadlock
//! Callers that hold slots and wait for more can wait for each other. So [`Staging::acquire`] is for who holds none; who
//! holds some takes more with [`Staging::try_acquire`], and otherwise first lets go of one.

use std::any::Any;
use std::collections::VecDeque;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::cuda::Event;
use super::slab::{self, SlabSlot};
use super::{Device, Kind};
use crate::error::{Error, Result};
use crate::storage::Landing;

/// The bytes of a slot, and so of the longest copy. Measured on an H100 whose pinned copies reach 55 GB/s: copies of 1 MiB
/// reach 48, of 2 MiB 51, of 4 MiB 53. Several threads fill one slot, so that the ring need not grow with its slots.
pub(crate) const SLOT_BYTES: usize = 4 << 20;

/// The slots of a device's ring: 64 MiB, which stays in the last-level cache. A ring of 256 MiB did not, and halved the rate.
pub(crate) const SLOTS: usize = 16;

/// A ring of slots. A handle: cloning it is free.
#[derive(Clone)]
pub(crate) struct Staging(Arc<Ring>);

struct Ring {
    device: Device,
    #[cfg(test)]
    slot_bytes: usize,
    #[cfg(test)]
    slots: usize,
    state: Mutex<State>,
    /// Told once for every slot that becomes free or busy, and to all when the ring fails.
    returned: Condvar,
}

#[derive(Default)]
struct State {
    /// The last to come back is the first to go out.
    free: Vec<Place>,
    /// The longest busy first.
    busy: VecDeque<Place>,
    /// Why the ring can no longer be used.
    failed: Option<String>,
}

/// A slot's memory, and what says that the hardware is done with it. The host has no hardware to wait for.
struct Place {
    bytes: SlabSlot,
    event: Option<Event>,
}

impl Place {
    fn is_idle(&self) -> Result<bool> {
        self.event.as_ref().map_or(Ok(true), Event::has_passed)
    }

    fn wait(&self) -> Result<()> {
        self.event.as_ref().map_or(Ok(()), Event::wait)
    }
}

impl Staging {
    /// A ring of its own. [`Device::staging`] is the one that transfers share.
    ///
    /// # Errors
    /// [`Error::Device`] where the memory cannot be had or pinned.
    ///
    /// # Panics
    /// If there are no slots, or they are not whole pages.
    pub(crate) fn new(device: &Device, slots: usize, slot_bytes: usize) -> Result<Staging> {
        assert!(slots > 0, "a ring without slots would make everyone wait for ever");
        let mut free = Vec::with_capacity(slots);
        for bytes in slab::slots(device, slots, slot_bytes)? {
            let event = match device.0 {
                Kind::Host => None,
                Kind::Cuda(gpu) => Some(gpu.event()?),
            };
            free.push(Place { bytes, event });
        }
        // The first to go out is the first in memory.
        free.reverse();
        let state = Mutex::new(State { free, ..State::default() });
        Ok(Staging(Arc::new(Ring {
            device: device.clone(),
            #[cfg(test)]
            slot_bytes,
            #[cfg(test)]
            slots,
            state,
            returned: Condvar::new(),
        })))
    }

    /// The device whose transfers these slots serve.
    #[cfg(test)]
    pub(crate) fn device(&self) -> &Device {
        &self.0.device
    }

    /// The bytes of every slot.
    #[cfg(test)]
    pub(crate) fn slot_bytes(&self) -> usize {
        self.0.slot_bytes
    }

    /// The number of slots: the most that can be held at once.
    #[cfg(test)]
    pub(crate) fn slots(&self) -> usize {
        self.0.slots
    }

    /// A slot. Blocks while all are held or busy: for callers that hold none (see the module's page).
    ///
    /// # Errors
    /// [`Error::Device`] once the device is lost.
    pub(crate) fn acquire(&self) -> Result<Slot> {
        self.acquire_within(None).map(|slot| slot.expect("it waits for ever"))
    }

    /// [`acquire`](Self::acquire), while others hold every slot for no longer than `patience`; `None` then.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub(crate) fn acquire_within(&self, patience: Option<Duration>) -> Result<Option<Slot>> {
        let until = patience.and_then(|patience| Instant::now().checked_add(patience));
        let ring = &self.0;
        let mut state = ring.state.lock();
        loop {
            ring.check(&state)?;
            let Some(place) = state.busy.pop_front() else {
                match (state.free.pop(), until) {
                    (Some(place), _) => return Ok(Some(self.slot(place))),
                    (None, None) => ring.returned.wait(&mut state),
                    (None, Some(until)) => {
                        let timed_out = ring.returned.wait_until(&mut state, until).timed_out();
                        if timed_out && state.free.is_empty() && state.busy.is_empty() {
                            return Ok(None);
                        }
                    }
                }
                continue;
            };
            let wait = state.free.is_empty();
            let idle =
                MutexGuard::unlocked(&mut state, || if wait { place.wait().map(|()| true) } else { place.is_idle() });
            match idle {
                Ok(true) => return Ok(Some(self.slot(place))),
                Ok(false) => {
                    ring.put_back(&mut state, place);
                    if let Some(place) = state.free.pop() {
                        return Ok(Some(self.slot(place)));
                    }
                }
                Err(error) => {
                    ring.fail(&mut state, place, &error);
                    return Err(error);
                }
            }
        }
    }

    /// A slot, if one is free or has just become idle; never waits.
    ///
    /// # Errors
    /// [`Error::Device`] once the device is lost.
    pub(crate) fn try_acquire(&self) -> Result<Option<Slot>> {
        let ring = &self.0;
        let mut state = ring.state.lock();
        ring.check(&state)?;
        if let Some(place) = state.busy.pop_front() {
            match MutexGuard::unlocked(&mut state, || place.is_idle()) {
                Ok(true) => return Ok(Some(self.slot(place))),
                Ok(false) => ring.put_back(&mut state, place),
                Err(error) => {
                    ring.fail(&mut state, place, &error);
                    return Err(error);
                }
            }
        }
        Ok(state.free.pop().map(|place| self.slot(place)))
    }

    /// Whether both are handles of one ring.
    #[cfg(test)]
    pub(super) fn is(&self, other: &Staging) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn slot(&self, place: Place) -> Slot {
        Slot { ring: Arc::clone(&self.0), place: Some(place) }
    }
}

impl Ring {
    fn check(&self, state: &State) -> Result<()> {
        match &state.failed {
            None => Ok(()),
            Some(why) => {
                Err(Error::Device { device: self.device.to_string(), action: "take a staging slot", why: why.clone() })
            }
        }
    }

    /// Puts a slot back that turned out to be busy still.
    fn put_back(&self, state: &mut State, place: Place) {
        state.busy.push_front(place);
        // Who came meanwhile saw neither a free nor a busy slot.
        self.returned.notify_one();
    }

    /// Loses a slot whose hardware cannot be waited for, and with it the ring.
    fn fail(&self, state: &mut State, place: Place, error: &Error) {
        mem::forget(place);
        state.failed.get_or_insert_with(|| error.to_string());
        self.returned.notify_all();
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for place in mem::take(&mut self.state.get_mut().busy) {
            if let Err(error) = place.wait() {
                tracing::warn!("{error}");
                mem::forget(place);
            }
        }
    }
}

/// A slot that the caller holds: bytes to fill or to read. What they are at first is whatever was there. It returns to
/// its ring when it is dropped.
pub(crate) struct Slot {
    ring: Arc<Ring>,
    /// Taken when it goes elsewhere.
    place: Option<Place>,
}

impl Slot {
    /// The device whose transfers it serves.
    pub(super) fn device(&self) -> &Device {
        &self.ring.device
    }

    /// Where the GPU sees the slot's first byte; `None` where it cannot reach host memory, and on the host.
    pub(super) fn device_address(&self) -> Option<u64> {
        self.place().bytes.device_address()
    }

    /// What to record behind a copy that uses this slot.
    ///
    /// # Panics
    /// On a slot of the host.
    pub(super) fn event(&self) -> &Event {
        self.place().event.as_ref().expect("every slot of a GPU's ring has an event")
    }

    /// The hardware uses the slot until its event, just recorded, has passed.
    pub(super) fn into_busy(mut self) -> BusySlot {
        BusySlot { ring: Arc::clone(&self.ring), place: self.place.take() }
    }

    /// The hardware may use the slot for ever: nobody can say when it is done.
    pub(super) fn abandon(mut self, error: &Error) {
        if let Some(place) = self.place.take() {
            self.ring.fail(&mut self.ring.state.lock(), place, error);
        }
    }

    fn place(&self) -> &Place {
        self.place.as_ref().expect("only the last use of a slot takes its place")
    }
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.place().bytes
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.place.as_mut().expect("only the last use of a slot takes its place").bytes
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.ring.state.lock().free.push(place);
            self.ring.returned.notify_one();
        }
    }
}

#[expect(unsafe_code, reason = "the trait's promise")]
// SAFETY: a slot's bytes are in the ring's memory, which stays where it is; they are the slot's own until it is dropped.
unsafe impl Landing for Option<Slot> {
    fn bytes(&mut self) -> &mut [u8] {
        self.as_deref_mut().unwrap_or_default()
    }

    fn leave(&mut self) -> Box<dyn Any + Send> {
        Box::new(self.take())
    }
}

/// A slot that the hardware uses. Dropping it does not wait: the ring does, before anyone else gets the slot.
pub(super) struct BusySlot {
    ring: Arc<Ring>,
    /// Taken when it goes elsewhere.
    place: Option<Place>,
}

impl BusySlot {
    /// Waits until the hardware is done; the thread sleeps meanwhile.
    pub(super) fn wait(mut self) -> Result<Slot> {
        let place = self.place.take().expect("only the last use of a slot takes its place");
        match place.wait() {
            Ok(()) => Ok(Slot { ring: Arc::clone(&self.ring), place: Some(place) }),
            Err(error) => {
                self.ring.fail(&mut self.ring.state.lock(), place, &error);
                Err(error)
            }
        }
    }

    /// Whether the hardware is done; does not wait.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> Result<bool> {
        self.place.as_ref().map_or(Ok(true), Place::is_idle)
    }
}

impl Drop for BusySlot {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.ring.state.lock().busy.push_back(place);
            self.ring.returned.notify_one();
        }
    }
}
