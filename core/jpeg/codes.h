// Constants of ITU-T T.81: markers, and the values of coded coefficients.
#pragma once

#include <cstdint>

namespace imseq {

// The byte behind the 0xFF of a marker (T.81 table B.1).
constexpr uint8_t kSof0 = 0xC0, kSof1 = 0xC1, kSof2 = 0xC2, kDht = 0xC4, kJpg = 0xC8, kDac = 0xCC,
                  kSof15 = 0xCF, kRst0 = 0xD0, kSoi = 0xD8, kEoi = 0xD9, kSos = 0xDA, kDqt = 0xDB,
                  kDri = 0xDD, kApp0 = 0xE0, kApp1 = 0xE1, kApp2 = 0xE2, kApp9 = 0xE9,
                  kApp13 = 0xED, kApp14 = 0xEE, kApp15 = 0xEF, kCom = 0xFE;

// The largest magnitudes that baseline codes of 8-bit samples can hold (T.81 tables F.1 and F.2).
constexpr int kMaxDcDifference = 2047, kMaxAc = 1023;

// T.81 F.2.2.1 (EXTEND): `size` extra bits stand for a value whose top bit tells the sign.
constexpr int extend(uint32_t extra, int size) {
  if (size == 0) return 0;
  const int value = static_cast<int>(extra);
  return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

}  // namespace imseq
