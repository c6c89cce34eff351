// What a test chooses about the launches to come, and what it learns of them, in C for ctypes.
#pragma once
#include <cstdint>

namespace emulator {

enum class Order : int { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kForward;  // of a block's threads and of the grid's blocks
  uint64_t seed = 0;              // of a shuffled order
  uint8_t fill = 0xff;            // what fresh memory holds; 0xff makes NaN and -1
  int arch = 75;                  // launches must be possible on this GPU
};

extern Options options;

}  // namespace emulator

extern "C" {
void emulator_set_order(int order, uint64_t seed, int fill);
void emulator_set_arch(int arch);
// How often the race checker has spoken since the program's start.
int emulator_races();
}
