// Checksum of a range of the words of a tensor.
//
// Included once per instruction set, inside namespace ddpm::DDPM_ISA (see kernels.inl).

inline Checksum checksum_words(const ChecksumArgs& a, int64_t begin, int64_t end) {
  Checksum checksum{};
  const char* bytes = static_cast<const char*>(a.data);
  const int64_t whole = a.bytes / 8 < end ? a.bytes / 8 : end;
  for (int64_t i = begin; i < whole; ++i) {
    uint64_t word;
    __builtin_memcpy(&word, bytes + 8 * i, sizeof word);
    add_word(checksum, word, static_cast<uint32_t>(i));
  }
  for (int64_t i = whole < begin ? begin : whole; i < end; ++i) {
    add_word(checksum, word_at(a.data, a.bytes, i), static_cast<uint32_t>(i));
  }
  return checksum;
}
