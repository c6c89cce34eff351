#pragma once

namespace partune {

struct Schema {
  const char* family;
  const char* text;
};

extern const Schema kSchemas[];
extern const int kSchemaCount;

}  // namespace partune
