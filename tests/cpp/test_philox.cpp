// Philox against the known answers of Random123, and the counter of the normals.
#include "check.h"
#include "core/normal.h"
#include "core/philox.h"

namespace ddpm::test {
namespace {

struct Known {
  uint32_t counter[4], key[2], expected[4];
};

// The lines "philox4x32 10" of Random123's kat_vectors.
constexpr Known kKnown[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
    {{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF},
     {0xFFFFFFFF, 0xFFFFFFFF},
     {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
    {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
     {0xA4093822, 0x299F31D0},
     {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}},
};

void known_answers() {
  for (const Known& k : kKnown) {
    const Philox4 w =
        philox4x32_10(k.counter[0], k.counter[1], k.counter[2], k.counter[3], k.key[0], k.key[1]);
    CHECK(w.r0 == k.expected[0], w.r0);
    CHECK(w.r1 == k.expected[1], w.r1);
    CHECK(w.r2 == k.expected[2], w.r2);
    CHECK(w.r3 == k.expected[3], w.r3);
  }
}

// The counter is (block, stream, low and high word of the sample), the key the words of the seed.
void normals_use_the_documented_counter() {
  const Known& k = kKnown[2];
  const uint64_t sample = k.counter[2] | uint64_t{k.counter[3]} << 32;
  const uint64_t seed = k.key[0] | uint64_t{k.key[1]} << 32;
  const Normal4 n = normal4(k.counter[0], k.counter[1], sample, seed);
  const NormalPair a = box_muller(k.expected[0], k.expected[1]);
  const NormalPair b = box_muller(k.expected[2], k.expected[3]);
  CHECK(bits_of(n.z[0]) == bits_of(a.z0), n.z[0], a.z0);
  CHECK(bits_of(n.z[1]) == bits_of(a.z1), n.z[1], a.z1);
  CHECK(bits_of(n.z[2]) == bits_of(b.z0), n.z[2], b.z0);
  CHECK(bits_of(n.z[3]) == bits_of(b.z1), n.z[3], b.z1);
}

}  // namespace
}  // namespace ddpm::test

int main() {
  return ddpm::test::run(ddpm::test::known_answers, ddpm::test::normals_use_the_documented_counter);
}
