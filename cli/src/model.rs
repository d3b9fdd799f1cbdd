//! A small decoder's tensors, by name and shape, as large as asked for: what `demo` puts.

/// Hidden sizes of real models, from toys to 70B.
const HIDDEN_SIZES: [u64; 9] = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

/// As few layers as still look like a model.
const LAYERS_MIN: u64 = 4;

/// Bytes of one bf16.
const ELEMENT_BYTES: u64 = 2;

/// A model's tensors in the order of its layers, all bf16.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) layers: u64,
    pub(crate) tensors: Vec<(String, Vec<u64>)>,
}

/// The sizes of one decoder.
#[derive(Clone, Copy)]
struct Sizes {
    hidden: u64,
    /// Of the feed-forward part: 2.75 times the hidden size.
    intermediate: u64,
    /// Of keys and values, which eight heads share.
    key_value: u64,
    vocabulary: u64,
}

impl Sizes {
    fn of(hidden: u64) -> Self {
        // A vocabulary that does not outweigh the layers of a toy.
        let vocabulary = (hidden * 16).min(32_000);
        Self { hidden, intermediate: hidden * 11 / 4, key_value: hidden / 8, vocabulary }
    }

    fn layer(self, layer: u64) -> Vec<(String, Vec<u64>)> {
        let Self { hidden, intermediate, key_value, .. } = self;
        [
            ("input_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![hidden, hidden]),
            ("self_attn.k_proj.weight", vec![key_value, hidden]),
            ("self_attn.v_proj.weight", vec![key_value, hidden]),
            ("self_attn.o_proj.weight", vec![hidden, hidden]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("mlp.gate_proj.weight", vec![intermediate, hidden]),
            ("mlp.up_proj.weight", vec![intermediate, hidden]),
            ("mlp.down_proj.weight", vec![hidden, intermediate]),
        ]
        .map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape))
        .into()
    }

    fn around(self) -> [(String, Vec<u64>); 3] {
        [
            ("model.embed_tokens.weight".into(), vec![self.vocabulary, self.hidden]),
            ("model.norm.weight".into(), vec![self.hidden]),
            ("lm_head.weight".into(), vec![self.vocabulary, self.hidden]),
        ]
    }
}

/// The bytes of a tensor of this shape.
pub(crate) fn len_bytes(shape: &[u64]) -> u64 {
    shape.iter().product::<u64>() * ELEMENT_BYTES
}

fn total(tensors: &[(String, Vec<u64>)]) -> u64 {
    tensors.iter().map(|(_, shape)| len_bytes(shape)).sum()
}

impl Model {
    /// The model nearest to `bytes` in size: the widest of which at least four layers fit, with as many layers as fit, and
    /// the rest in its vocabulary.
    pub(crate) fn of_bytes(bytes: u64) -> Self {
        let fits = |hidden: &&u64| {
            let sizes = Sizes::of(**hidden);
            total(&sizes.around()) + LAYERS_MIN * total(&sizes.layer(0)) <= bytes
        };
        // Up to 70 GiB or so a hidden size of 4096 is as wide as models are.
        let hidden = HIDDEN_SIZES.iter().filter(|&&hidden| hidden <= 4096 || bytes > 70 << 30).rev().find(fits);
        let mut sizes = Sizes::of(*hidden.unwrap_or(&HIDDEN_SIZES[0]));
        let layer = total(&sizes.layer(0));
        let rest = bytes.saturating_sub(total(&sizes.around()));
        let layers = (rest / layer).max(1);
        // A word of the vocabulary is a row of the embedding, and one of the head.
        sizes.vocabulary += rest.saturating_sub(layers * layer) / (2 * sizes.hidden * ELEMENT_BYTES);
        let [embedding, norm, head] = sizes.around();
        let mut tensors = vec![embedding];
        tensors.extend((0..layers).flat_map(|layer| sizes.layer(layer)));
        tensors.extend([norm, head]);
        Self { layers, tensors }
    }

    /// The bytes of all tensors.
    pub(crate) fn len_bytes(&self) -> u64 {
        total(&self.tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_about_as_large_as_asked_for() {
        for bytes in [4 << 20, 64 << 20, 1 << 30, 7 << 30, 100 << 30] {
            let model = Model::of_bytes(bytes);
            let off = model.len_bytes().abs_diff(bytes);
            assert!(off * 200 <= bytes, "{bytes}: {} bytes in {} layers", model.len_bytes(), model.layers);
            assert_eq!(model.tensors.len() as u64, model.layers * 9 + 3);
        }
        assert!(Model::of_bytes(1).len_bytes() < 1 << 20);
        let names: std::collections::BTreeSet<_> = Model::of_bytes(1 << 30).tensors.into_iter().map(|t| t.0).collect();
        assert_eq!(names.len() as u64, Model::of_bytes(1 << 30).layers * 9 + 3);
    }
}
