//! What the index knows: asked by the caller's own thread as long as all of it that is needed is in memory, since a lookup takes
//! less than waking another; else by one of the store's, which is waited for no longer than the deadline.

use std::sync::Arc;

use crate::error::Result;
use crate::index::{Version, waiting};
use crate::store::core::Core;

impl Core {
    /// Asks a version about a key, or keys with a prefix.
    pub(crate) fn look_up<T: Send + 'static>(
        &self,
        version: &Arc<Version>,
        key: &[u8],
        ask: impl Fn(&Version, &[u8]) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let Some(deadline) = self.deadline else { return ask(version, key) };
        let outcome = waiting::forbidden(|| ask(version, key));
        if !outcome.as_ref().is_err_and(waiting::was_forbidden) {
            return outcome;
        }
        let work = {
            let (version, key) = (Arc::clone(version), key.to_vec());
            move || ask(&version, &key)
        };
        let found = self.watched.run(deadline, &self.watched.steps(), work);
        found.unwrap_or_else(|| Err(self.given_up("look up", self.layout.index(), deadline)))
    }
}
