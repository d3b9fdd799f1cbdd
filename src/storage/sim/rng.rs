//! Numbers that look random and are the same on every machine, and the hash behind fingerprints.

/// A stream of numbers that a seed determines (splitmix64, Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is at least one.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

const KEYS: [u64; 8] = [
    0xA076_1D64_78BD_642F,
    0xE703_7ED1_A0B4_28DB,
    0x8EBC_6AF0_9C88_C6E3,
    0x5899_65CC_7537_4CC3,
    0x1D8E_4E27_C47D_124F,
    0xEB44_ACCA_B455_D165,
    0x9E37_79B1_85EB_CA87,
    0xC2B2_AE3D_27D4_EB4F,
];

/// Two numbers made into one, by a multiplication folded upon itself (the step of wyhash).
pub(super) fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ KEYS[0]) * u128::from(b ^ KEYS[1]);
    (product as u64) ^ (product >> 64) as u64
}

/// A hash of a page: four independent lanes, so that it runs at several bytes a cycle.
pub(super) fn hash_page(bytes: &[u8; 4096]) -> u64 {
    let mut lanes = [KEYS[2], KEYS[3], KEYS[4], KEYS[5]];
    let (blocks, _) = bytes.as_chunks::<64>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = fold(*lane ^ u64::from_le_bytes(words[2 * i]), KEYS[i] ^ u64::from_le_bytes(words[2 * i + 1]));
        }
    }
    fold(fold(lanes[0], lanes[1]), fold(lanes[2], lanes[3]))
}

/// A hash of a name.
pub(super) fn hash_name(name: &str) -> u64 {
    name.bytes().fold(KEYS[6], |hash, byte| fold(hash, u64::from(byte)))
}
